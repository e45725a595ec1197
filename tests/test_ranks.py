"""ranks.py: two processes make the update that one would have made, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import settings, short_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import recode
from config import Config
from upkeep import checkpoint, metrics, ranks, run

ROOT = Path(__file__).parent.parent
# What a run of each algorithm sets; three prompts for two ranks, and minibatches of few groups.
OWN = {"grpo": {"group_size": 4, "minibatches": 1}, "sft": {}}
OWN["dapo"] = OWN["grpo"] | {"max_refills": 1}
PAIRS = [("grpo", "ranks"), ("dapo", "ranks"), ("sft", "ranks"), ("grpo", "shards")]
SCRIPT = """
import json, sys
import recode
from config import Config
from upkeep import checkpoint, ranks, run
for settings in json.loads(sys.argv[1]):
    run.run(Config(**settings), recode.LOOPS)
"""
# As if a run of two steps had been killed after its first one; then what each rank holds of it.
AGAIN = """
import pathlib, config
folder = pathlib.Path(settings["out"])
if not ranks.rank():
    (folder / "checkpoint").rename(folder / "uninterrupted")
ranks.dist.barrier()
config = config.parse(["--resume", str(folder)])
policy, state = run.start(config)
list(recode.finetune(config, policy, state))
checkpoint.save(folder, policy, state)
held = [[p, *(state.optimizer.state[p][m] for m in checkpoint.MOMENTS[1:])]
        for p in policy.model.parameters()]
count = [sum(x.to_local().numel() for x in kind) for kind in zip(*held)]
(folder / f"held-{ranks.rank()}").write_text(json.dumps(count))
"""


def run_of(folder: Path, algo: str, how: str, **more) -> dict:
    """The settings of a run with one process, two, or two and their shards; folder has the rows."""
    common = dict(data=str(folder / "rows.jsonl"), steps=1, prompts=3, max_new_tokens=128)
    common |= dict(eval_rows=1, threads=1, device="cpu", pack_tokens=1)  # each group its own pack
    own = {"algo": algo, "out": str(folder / f"{algo}-{how}"), "shard": how == "shards"}
    return common | OWN[algo] | own | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs here, with their rows."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = "".join(json.dumps(asdict(e)) + "\n" for e in short_rows())
    (folder / "rows.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def ended(folder, tiny):
    """The folder with the runs of PAIRS and of one process, and one of shards that went on."""
    jobs = [run_of(folder, *pair) for pair in PAIRS]
    jobs += [run_of(folder, "sft", "shards", model=str(tiny), steps=2, save_every=1)]
    both = torchrun(folder, jobs, SCRIPT + AGAIN)
    for algo in OWN:
        assert run.main(Config(**run_of(folder, algo, "alone")), recode.LOOPS) == 0
    shown = both.communicate(timeout=300)[0]
    assert both.returncode == 0, shown
    return folder


def torchrun(folder: Path, settings: list[dict], code: str = SCRIPT, **how) -> subprocess.Popen:
    script = folder / "two.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), json.dumps(settings)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=env, **pipes, **how)


def test_two_ranks_are_one_run(ended):
    """Prevents: means of means over the ranks, other samples, or a rank that waits for ever when it
    has no live group or no row to grade, or fewer packs than another; with shards too."""
    for algo, how in PAIRS:
        one, two = (ended / f"{algo}-{x}" for x in ("alone", how))
        for a, b in zip(metrics.history(one), metrics.history(two), strict=True):
            for name in a.keys() - {"seconds", "tokens_per_s"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (algo, how, name)
        # After one update AdamW's first moment is a tenth of the gradient. Not the weights: where a
        # gradient is nearly 0 its sign decides, and AdamW makes a whole step of it.
        moments, shared = (
            load_file(f / "checkpoint" / "optimizer.safetensors") for f in (one, two)
        )
        for name in (name for name in moments if name.endswith("exp_avg")):
            torch.testing.assert_close(10 * moments[name], 10 * shared[name], atol=1e-6, rtol=0)
        texts = [(f / "before.jsonl").read_text() for f in (one, two)]
        assert texts[0] == texts[1] and (two / "curves.png").stat().st_size > 1000
    assert any(row["grad_norm"] > 0.01 for row in metrics.history(ended / "grpo-ranks"))


def test_a_killed_run_of_shards_goes_on(ended):
    """Prevents: another run after --resume, moments of the wrong rows, or a rank that holds all."""
    folder = ended / "sft-shards"
    for name in ("model", "optimizer", "random"):
        first, again = (
            load_file(folder / kept / f"{name}.safetensors")
            for kept in ("uninterrupted", "checkpoint")
        )
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first), name
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    total = sum(p.numel() for p in model.parameters())
    of_ranks = (json.loads((folder / f"held-{r}").read_text()) for r in (0, 1))
    for held in zip(*of_ranks, strict=True):  # weights, then each average
        assert sum(held) == total and max(held) < 0.6 * total


def test_one_rank_that_fails_does_not_wait_to_save(small, monkeypatch):
    """Prevents: an error on one rank that shows after the time limit of the save that it began."""
    config = settings(small)
    policy, state = run.start(config)
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(1))

    def failing():
        raise MemoryError
        yield

    for config.shard in (False, True):
        with pytest.raises(MemoryError):
            run.follow(failing(), config, policy, state, None)
        assert saved == [1]


def test_a_rank_without_a_prompt_draws_along(small, monkeypatch):
    """Prevents: a traceback where a refill has fewer prompts than there are ranks, or random
    numbers that are no longer the same on all of them."""
    config = settings(small)
    policy, state = run.start(config)
    rows, shares, after = data.load(config.data)[:1], [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "gather", lambda mine: shares.append(mine) or shares[0])
    for number in range(2):
        monkeypatch.setenv("RANK", str(number))
        state.set_generators()
        rollout = recode.sample(policy, rows, config, state)
        assert len(rollout.prompts) == 1
        after.append(state.generator.get_state())
    assert [len(mine) for mine in shares] == [1, 0] and torch.equal(*after)


def test_shards_need_ranks(small):
    """Prevents: --shard in one process, which would end in a traceback from torch.distributed."""
    with pytest.raises(ValueError, match="start torchrun, or give --no-shard"):
        run.start(settings(small, shard=True))


def test_ctrl_c_ends_all_ranks(folder):
    """Prevents: a rank that waits for ever for one that has gone."""
    config = run_of(folder, "sft", "stopped", steps=10_000)
    both = torchrun(folder, [config], start_new_session=True)
    metrics = Path(config["out"], "metrics.jsonl")
    end = time.time() + 240
    while time.time() < end and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.05)
    os.killpg(both.pid, signal.SIGINT)
    assert both.communicate(timeout=120)[0] is not None
    assert both.returncode != 0 and checkpoint.newest(Path(config["out"])) is not None


def test_shares_come_together_again(monkeypatch):
    """Prevents: rollouts in another order than their prompts."""
    items = list(range(7))
    parts = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        parts.append(ranks.share(items))
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]

    def everybody(out, mine):
        out[:] = parts

    monkeypatch.setattr(ranks.dist, "all_gather_object", everybody)
    assert ranks.gather(parts[2]) == items
