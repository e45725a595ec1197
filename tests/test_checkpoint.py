"""checkpoint.py: whoever ends a run, and however, it goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import settings, short_rows
from safetensors.torch import load_file, save_file

import lora
import recode
from config import parse
from policy import load
from upkeep import checkpoint, machine, metrics, run

ROOT = Path(__file__).parent.parent


def begin(small, **more):
    """A policy and a state that have made one step, and their folder."""
    config = settings(small, **more)
    policy, state = run.start(config)
    next(recode.train(config, policy, state))
    return policy, state, Path(small["out"])


# ---------------------------------------------------------------- save and restore


def test_everything_comes_back(small):
    """Prevents: a resumed run that draws other samples, or whose AdamW has lost its moments."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    torch.rand(9)
    shutil.copy(small["data"], folder / "rows.jsonl")
    (folder / "config.json").write_text(json.dumps(settings(small).record()))
    again, restored = run.start(parse(["--resume", str(folder)]))
    for name in ("step", "drawn", "teaching", "idle", "skipped"):
        assert getattr(restored, name) == getattr(state, name)
    restored.set_generators()
    assert torch.equal(restored.generator.get_state(), state.generator.get_state())
    for (name, p), q in zip(policy.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, moment in state.optimizer.state[p].items():
            assert torch.equal(moment, restored.optimizer.state[q][key]), (name, key)


def test_no_file_of_a_checkpoint_can_run_code(small):
    """Prevents: a pickle, which runs what it likes when it is loaded."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    ends = {p.suffix for p in (folder / "checkpoint").iterdir()}
    assert ends <= {".safetensors", ".json", ".jinja"}


def test_the_newest_are_kept(small, monkeypatch):
    """Prevents: a disk full of checkpoints, or only one when it turns out to be bad."""
    policy, state, folder = begin(small)
    monkeypatch.setattr(checkpoint, "KEPT", 3)
    for step in range(1, 6):
        state.step = step
        checkpoint.save(folder, policy, state)
    names = {p.name: checkpoint.read_state(p)["step"] for p in folder.iterdir()}
    assert names == {"checkpoint": 5, "checkpoint-4": 4, "checkpoint-3": 3}
    monkeypatch.setattr(checkpoint, "KEPT", 1)
    checkpoint.save(folder, policy, state)  # the same step again
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(small, monkeypatch):
    """Prevents: `No space left` as a traceback, with half a checkpoint in place of a whole one."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    state.step = 2

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError, match="step 2 cannot be written .*No space left.*make room"):
        checkpoint.save(folder, policy, state)
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]
    assert checkpoint.read_state(checkpoint.newest(folder))["step"] == 1


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "config.json"]
)
def test_a_flipped_byte_is_found(small, name):
    """Prevents: bits that rot in a checkpoint are trained on as if nothing were wrong."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    file = folder / "checkpoint" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged: delete the folder checkpoint "):
        checkpoint.newest(folder)


@pytest.mark.parametrize(
    "spoil",
    [*(lambda text, new=new: new for new in ("", "{", "[]", '{"step": 1}')),
     lambda text: text.replace('"drawn": 2', '"drawn": 3')],
)  # fmt: skip
def test_a_damaged_state_is_one_sentence(small, spoil):
    """Prevents: a KeyError for a file that a person opened and saved, or another place in the
    data after an edit that nobody remembers."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    file = folder / "checkpoint" / "state.json"
    assert spoil(file.read_text()) != file.read_text()
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ValueError, match="state.json is damaged"):
        checkpoint.newest(folder)


def test_other_data_are_refused(small):
    """Prevents: a run that goes on with rows that changed, under the grades of the old ones."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    (folder / "config.json").write_text(json.dumps(settings(small).record()))
    file = Path(small["data"])
    file.write_text(file.read_text().replace("lib.new_3", "lib.newer_3"))
    with pytest.raises(ValueError, match="not those that the run began with"):
        run.start(parse(["--resume", str(folder)]))


@pytest.mark.parametrize("changed", ["base", "adapters", "config.json"])
def test_another_model_is_refused(small, tmp_path, changed):
    """Prevents: a reference that changes at --resume (kl 0, then 0.5), or adapters that go on over
    another base, when the folder that the run began from was written anew."""
    base = shutil.copytree(small["model"], tmp_path / "base")
    policy, own = load(str(base), "cpu"), tmp_path / "own"
    policy.adapt(lora.Adapter(rank=2), torch.Generator())
    policy.save(own)
    config = settings(small, model=str(own))
    policy, state = run.start(config)
    folder = Path(small["out"])
    checkpoint.save(folder, policy, state)
    (folder / "config.json").write_text(json.dumps(config.record()))
    (base / "README.md").write_text("what is no part of the model may change")
    run.start(parse(["--resume", str(folder)]))
    if changed == "config.json":
        file = base / changed
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    else:
        name = "model" if changed == "base" else "adapter_model"
        file = (base if changed == "base" else own) / f"{name}.safetensors"
        tensors = {key: tensor + 1 for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="files of --model are not those that the run began with"):
        run.start(parse(["--resume", str(folder)]))


def test_a_folder_of_an_older_version_goes_on(small):
    """Prevents: a KeyError for a run that was begun before models had fingerprints."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    (folder / "config.json").write_text(json.dumps(settings(small).record()))
    file = folder / "checkpoint" / "state.json"
    counts = json.loads(file.read_text())
    for name in ("model", "seal"):
        counts.pop(name)
    file.write_text(json.dumps(counts | {"seal": checkpoint.seal(counts)}))
    _, again = run.start(parse(["--resume", str(folder)]))
    assert again.step == 1 and again.model == checkpoint.fingerprint(small["model"])


def test_a_lost_file_is_found(small):
    """Prevents: a checkpoint without its optimizer starts AdamW anew in silence."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    (folder / "checkpoint" / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged"):
        checkpoint.newest(folder)


@pytest.mark.parametrize("left", ["checkpoint.new", "checkpoint-1"])
def test_a_whole_checkpoint_under_another_name_is_used(small, left):
    """Prevents: a kill between two renames leaves a whole checkpoint that nobody looks for."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    (folder / "checkpoint").rename(folder / left)
    (folder / "checkpoint.draft").mkdir()  # and half of another is no checkpoint
    assert checkpoint.read_state(checkpoint.newest(folder))["step"] == 1


@pytest.mark.parametrize("half", ["", "optimizer.safetensors"])
def test_a_kill_while_the_last_one_is_deleted_is_mended(small, half):
    """Prevents: `No such file: checkpoint/state.json` at every --resume, beside a whole one."""
    policy, state, folder = begin(small)
    checkpoint.save(folder, policy, state)
    shutil.copytree(folder / "checkpoint", folder / "checkpoint.new")  # the same step again
    (folder / "checkpoint" / "state.json").unlink()
    (folder / "checkpoint" / half).unlink() if half else None
    assert checkpoint.read_state(checkpoint.newest(folder))["step"] == 1
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]


def test_a_kill_before_the_configuration_is_written_leaves_a_folder_to_start_in(small, monkeypatch):
    """Prevents: a folder that a new run calls "not empty" and --resume "no run to go on with"."""
    real, done = run.write, []

    def killed(path, text):
        done.append(path.name)
        path.with_name(path.name + ".draft").write_text(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(settings(small), recode.LOOPS)
    assert done == ["config.json"]
    monkeypatch.setattr(run, "write", real)
    run.run(settings(small), recode.LOOPS)


# ---------------------------------------------------------------- two runs, one folder


def test_a_folder_belongs_to_one_run(small):
    """Prevents: two runs with the same --out, both accepted, both told that all is well."""
    folder = Path(small["out"])
    with checkpoint.claimed(folder):
        for _ in range(2):  # a refused run must not take the claim away
            with pytest.raises(ValueError, match="in use by another run"):
                run.run(settings(small), recode.LOOPS)
    run.run(settings(small), recode.LOOPS)
    with checkpoint.claimed(folder), pytest.raises(ValueError, match="in use"):
        run.run(parse(["--resume", str(folder), "--steps", "3"]), recode.LOOPS)


def test_a_claim_ends_with_its_process(small):
    """Prevents: a lock file of a killed run that has to be deleted by hand."""
    code = "import pathlib, sys, time\nfrom upkeep import checkpoint\n"
    code += "with checkpoint.claimed(pathlib.Path(sys.argv[1])): print('held', flush=True); "
    code += "time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, small["out"]], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="in use"), checkpoint.claimed(Path(small["out"])):
        pass
    holder.kill()
    holder.wait()
    with checkpoint.claimed(Path(small["out"])):
        assert checkpoint.is_empty(Path(small["out"]))


def test_a_used_run_folder_is_not_overwritten(small):
    """Prevents: the second run with the same --out destroys the first."""
    folder = Path(small["out"])
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        run.run(settings(small), recode.LOOPS)
    assert (folder / "metrics.jsonl").read_text() == "precious"


# ---------------------------------------------------------------- signals


@pytest.fixture
def terminal():
    """Signals as a terminal's process has them: under nohup or in a script's background the tests
    would inherit that they are ignored."""
    kept = {number: signal.getsignal(number) for number in machine.POLITE}
    for number in kept:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_the_step(small, monkeypatch, number, terminal):
    """Prevents: half a step in the checkpoint, which no resumed run can make whole."""
    real, calls = recode.step, []

    def interrupted(*args, **how):
        calls.append(1)
        if len(calls) == 1:  # before the first of the step's two minibatches
            os.kill(os.getpid(), number)
        return real(*args, **how)

    whole = Path(small["out"] + "-whole")
    run.run(settings(small, out=str(whole)), recode.LOOPS)
    monkeypatch.setattr(recode, "step", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run.run(settings(small), recode.LOOPS)
    assert signal.getsignal(number) is handler
    monkeypatch.setattr(recode, "step", real)
    assert checkpoint.read_state(Path(small["out"], "checkpoint"))["step"] == 1
    run.run(parse(["--resume", small["out"]]), recode.LOOPS)
    assert outcome(Path(small["out"])) == outcome(whole)


def test_a_second_signal_does_not_wait_and_saves_no_half_step(small, monkeypatch, terminal):
    """Prevents: Ctrl-C that hangs for minutes; or one that saves weights between two updates."""
    calls, real = [], recode.step

    def interrupted(*args, **how):
        calls.append(real(*args, **how))
        if len(calls) == 3:  # the first of two minibatches of step 2
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return calls[-1]

    monkeypatch.setattr(recode, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(settings(small, save_every=1), recode.LOOPS)
    assert len(calls) == 3
    assert checkpoint.read_state(Path(small["out"], "checkpoint"))["step"] == 1


def test_a_terminal_that_is_gone_does_not_break_a_step(monkeypatch):
    """Prevents: SIGHUP of a closed terminal, whose EIO from the handler ends the step midway."""

    def gone(number, text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(machine.os, "write", gone)
    with machine.noting_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
    assert noted == [signal.SIGTERM]


def test_nohup_is_respected():
    """Prevents: `nohup python recode.py &` dies when its terminal closes."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with machine.noting_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not noted and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


# ---------------------------------------------------------------- killed anywhere, the same run


def outcome(folder: Path) -> tuple:
    """All that a run leaves, but for times and memory."""
    rows = metrics.rows(folder)
    for row in rows:
        for name in ("seconds", "tokens_per_s", "minutes", "memory_gb"):
            row.pop(name, None)
    tensors = [load_file(file) for file in sorted((folder / "checkpoint").glob("*.safetensors"))]
    weights = [(key, t.numpy().tobytes()) for file in tensors for key, t in sorted(file.items())]
    texts = [(folder / n).read_bytes() for n in ("samples.md", "before.jsonl", "after.jsonl")]
    return rows, weights, texts


# Forks a child for each session of a run, so that torch is imported once. A child counts its calls
# of functions and kills itself at the one it is told: moments of the run, not of the clock. Prints
# for each trial its folder, the call, and whether it was killed.
SESSIONS = """
import json, os, random, signal, sys
import torch
torch.set_num_threads(1)
import recode, config
from matplotlib import pyplot
from upkeep import run

def session(arguments, at=0):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        calls = 0
        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        code = run.main(config.parse(arguments), recode.LOOPS)
        sys.setprofile(None)
        os.write(writer, str(calls).encode())
        os._exit(code)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status), int(os.read(reader, 99) or 0)

start, out, kills = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = session(start + ["--out", out + "-whole"])[1]
moments = random.Random(0)
for trial in range(kills):
    # An even spread over a run's life: each is killed once, then goes on to its end.
    at = int(calls * (trial + moments.random()) / (kills + 0.1)) + 1
    folder = f"{out}-{trial}"
    killed = session(start + ["--out", folder], at)[0]
    begun = os.path.exists(folder + "/config.json")
    session(["--resume", folder] if begun else start + ["--out", folder])
    print(json.dumps([folder, at, killed]))
"""


# The bundled policy, which is right now and then: a random one never is, and would learn nothing.
@pytest.mark.parametrize("algo", ["grpo", "dapo", "sft"])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(small, algo):
    """Prevents: a resumed run that is another run: in its weights, metrics, answers or reports."""
    Path(small["data"]).write_text("".join(json.dumps(asdict(e)) + "\n" for e in short_rows()))
    own = {"grpo": ["--group-size", "4"], "sft": []}
    own["dapo"] = [*own["grpo"], "--filter", "reward", "--max-refills", "1"]
    start = [
        *("--algo", algo, "--data", small["data"], "--device", "cpu", "--threads", "1"),
        *("--steps", "4", "--prompts", "4", "--max-new-tokens", "128", "--eval-rows", "1"),
        *("--save-every", "2", *own[algo]),
    ]
    kills = int(os.environ.get("KILLS", "3"))  # KILLS=7 for twenty-one, which takes minutes
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS, json.dumps(start), small["out"], str(kills)],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == kills, done.stderr
    assert all(killed for _, _, killed in trials)
    whole = outcome(Path(small["out"] + "-whole"))
    assert [row.get("step") for row in whole[0]] == [1, 2, 3, 4, None]
    assert all(row["grad_norm"] > 0.01 for row in whole[0][:4])
    for folder, at, _ in trials:
        assert outcome(Path(folder)) == whole, at
