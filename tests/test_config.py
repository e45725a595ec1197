"""config.py: wrong settings end in one sentence, before anything is loaded."""

import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import settings

import recode
from config import PRESETS, Config, from_command_line, parse, parser
from upkeep import run

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"algo": "ppo"}, "choose from grpo, dapo, drgrpo, gspo, cispo, sft"),
        ({"group_size": 1}, "an advantage compares samples"),
        ({"steps": 0}, "--steps is 0: give 1 or more"),
        ({"temperature": 0.0}, "greedy samples are all alike"),
        ({"warmup": -1}, "--warmup is -1: give 0 or more"),
        ({"algo": "dapo", "dual_clip": 1.2}, "must exceed 1"),
        ({"correctness": "bleu"}, "choose from es_star, em_star"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm is -1.0: give more than 0"),
        ({"lr": float("nan")}, "--lr is nan: give 0 or more"),
        ({"temperature": float("inf")}, "greedy samples are all alike"),
        ({"clip": 1.0}, "less than 1"),
        ({"lr_floor": 1.1}, "--lr-floor is 1.1: give 0 or more, and at most 1"),
        ({"targets": "q_proj"}, "give --adapter lora too"),
        ({"algo": "dapo", "dual_clip": float("nan")}, "must exceed 1"),
        ({"algo": "dapo", "overlong_buffer": 9999}, "must not exceed"),
        ({"seed": 2**64}, "less than 2.63"),
        ({"seed": -1}, "--seed is -1"),
        ({"threads": 10**5}, "at most 1024"),  # torch dies of it
        ({"adapter": "lora", "rank": 10**8}, "at most 1024"),
        ({"lr": 1e38}, "at most 1e6"),  # AdamW: "cannot be converted to type float"
        ({"group_size": 10**9}, "tokens in one rollout: lower one of them"),
        ({"steps": "3"}, "--steps is '3': give a value of type int"),
        ({"steps": True}, "--steps is True: give a value of type int"),
        ({"scale": 1}, "--scale is 1: give a value of type bool"),
        ({"algo": "dapo", "clip": 0.3}, "--clip is a setting of grpo and drgrpo: leave it away"),
        ({"algo": "sft", "group_size": 4}, "--group-size is a setting of all but sft: leave"),
        ({"algo": "drgrpo", "scale": False}, "--scale is a setting of all but drgrpo and sft"),
        ({"algo": "cispo", "clip_low": 0.1}, "--clip-low is a setting of dapo and gspo"),
        ({"algo": "gspo", "clip_low": 1.0}, "--clip-low is 1.0: give 0 or more, and less than 1"),
        ({"algo": "dapo", "clip_high": 9.5}, "--dual-clip must exceed 1 . --clip-high"),
        ({"shard": True, "adapter": "lora"}, "leave it away with --adapter"),
        ({"filter": "reward"}, "--filter is a setting of dapo: leave it away with --algo grpo"),
    ],
)
def test_wrong_values_are_one_sentence(small, wrong, sentence):
    """Prevents: a slip on the command line shows a traceback after minutes of loading."""
    with pytest.raises(ValueError, match=sentence):
        Config(**small | wrong)


def test_graded_rows_are_as_many_as_were_asked_for():
    """Prevents: 0 rows that are 50 or 300, as the model has it, and a default nobody is told."""
    assert Config().eval_rows == 300 and Config(model="x").eval_rows == 300
    assert parse(["--eval-rows", "0"]).eval_rows == 0
    assert parse(["--model", "x", "--eval-rows", "7"]).eval_rows == 7
    shown = " ".join(parser().format_help().split())
    assert "rows of each split in the tables, at most; 0 is no table (default: 300)" in shown


def test_settings_of_another_algorithm_are_refused_even_at_their_default():
    """Prevents: `--algo dapo --clip 0.2` recorded as if DAPO had used it."""
    with pytest.raises(ValueError, match="--clip is a setting of grpo and drgrpo"):
        parse(["--algo", "dapo", "--clip", "0.2"])
    assert "clip" not in Config(algo="dapo").record() and "clip" in Config().record()
    assert "group_size" not in Config(algo="sft").record()


def test_clips_are_the_algorithms_own_unless_given():
    """Prevents: GSPO with DAPO's clip, a thousand times its own; a clip that a flag cannot change;
    a resumed run that takes another."""
    for algo, clips in {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (0, 4)}.items():
        config = parse(["--algo", algo])
        assert (config.clip_low, config.clip_high) == clips
        assert Config(**config.record()) == config
    given = parse(["--algo", "gspo", "--clip-high", "0.01"])
    assert (given.clip_low, given.clip_high) == (3e-4, 0.01)
    assert parse(["--algo", "cispo", "--clip-high", "20"]).clip_high == 20  # no dual clip above it


def test_every_field_is_a_flag_with_help(capsys):
    """Prevents: a setting that only an editor of the source can reach."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name in asdict(Config()):
        assert "--" + name.replace("_", "-") in shown


def test_help_does_not_wait_for_torch():
    """Prevents: seconds before --help or a wrong flag is answered."""
    code = "import sys, config; config.parse(['--steps', '3']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "False\n", shown
    for arguments, rc in (
        (["--help"], 0),
        (["--steps", "0"], 2),
        (["--algo", "sft", "--clip", "1"], 2),
    ):
        shown = subprocess.run(
            [sys.executable, "-X", "importtime", "recode.py", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert shown.returncode == rc and "| torch\n" not in shown.stderr
        assert "Traceback" not in shown.stderr


def test_command_line_errors_have_no_traceback(small, capsys, monkeypatch, tmp_path):
    """Prevents: a missing model folder ends in forty lines from inside the hub client."""
    for arguments in (
        ["--model", "/no/such/folder", "--out", str(tmp_path / "x")],
        ["--data", "/no/such/file", "--out", str(tmp_path / "x")],
        ["--resume", "/no/such/run"],
        ["--model", small["model"], "--out", str(tmp_path / "y"), "--max-new-tokens", "5000"],
    ):
        monkeypatch.setattr("sys.argv", ["recode.py", *arguments])
        try:
            code = run.main(from_command_line(), recode.LOOPS)
        except SystemExit as end:
            code = end.code
        assert code == 2
        error = capsys.readouterr().err
        assert error.startswith("recode.py: ") and error.count("\n") == 1, error


def test_resume_in_another_dtype(small, capsys):
    """Prevents: all weights trained on in other products without a word, or adapters that no
    machine without bf16 units can go on with."""
    folder = Path(small["out"])
    folder.mkdir()
    record = settings(small).record()
    for adapter in ("none", "lora"):
        (folder / "config.json").write_text(
            json.dumps(record | {"dtype": "float32", "adapter": adapter})
        )
        again = ["--resume", str(folder), "--dtype", "bfloat16"]
        if adapter == "none":
            with pytest.raises(ValueError, match="trained in float32: --dtype may change under"):
                parse(again)
        else:
            assert parse(again).dtype == "bfloat16"
            assert "from here on with --dtype bfloat16" in capsys.readouterr().out
        assert parse([*again[:-1], "float32"]).dtype == "float32"


def test_resume_refuses_another_configuration(small):
    """Prevents: a traceback, or one run made of two configurations, whose record is then false."""
    folder = Path(small["out"])
    folder.mkdir()
    record = settings(small).record()
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="leave --lr away"):
        parse(["--resume", str(folder), "--lr", "1"])
    assert parse(["--resume", str(folder), "--steps", "7"]).steps == 7
    for other in ('{"what": 1}', "[]", "{}", "{", '"x"', ""):
        (folder / "config.json").write_text(other)
        with pytest.raises(ValueError, match="not a configuration of this version"):
            parse(["--resume", str(folder)])
    (folder / "config.json").write_text(json.dumps(record | {"steps": "12"}))
    with pytest.raises(ValueError, match="config.json: --steps is '12'"):
        parse(["--resume", str(folder)])


def test_presets_are_the_papers_settings():
    """Prevents: a preset that trains something else than the paper (its tables of settings)."""
    grpo, dapo = (parse(["--preset", f"paper-{algo}"]) for algo in ("grpo", "dapo"))
    for c in (grpo, dapo):
        assert (c.adapter, c.rank, c.alpha, c.targets) == ("dora", 64, 64, "q_proj,v_proj")
        assert (c.lr, c.warmup, c.lr_floor) == (5e-5, 150, 0.1)
        assert (c.steps, c.max_new_tokens, c.group_size, c.temperature) == (5000, 1024, 8, 1)
        assert c.correctness == "es_star" and c.scale and c.filter == "exact"
    assert (grpo.algo, grpo.clip, grpo.beta, grpo.prompts, grpo.minibatches) == (
        "grpo",
        0.2,
        1e-3,
        1,
        1,
    )
    assert (dapo.algo, dapo.clip_low, dapo.clip_high, dapo.dual_clip) == ("dapo", 0.2, 0.28, 10)
    assert (dapo.prompts, dapo.minibatches, dapo.overlong_buffer) == (8, 2, 0)
    assert (dapo.weight_decay, dapo.max_grad_norm) == (0.1, 1)


def test_any_flag_overrides_a_preset():
    """Prevents: a preset that wins over what was asked for, or that refuses other adapters."""
    changed = parse(["--lr", "1", "--preset", "paper-grpo", "--beta", "0"])
    assert (changed.lr, changed.beta, changed.steps) == (1, 0, 5000)
    lora = parse(["--preset", "paper-dapo", "--adapter", "lora", "--rank", "8"])
    assert (lora.adapter, lora.rank, lora.alpha) == ("lora", 8, 64)
    whole = parse(["--preset", "paper-dapo", "--adapter", "none", "--lr", "1e-6"])
    assert (whole.adapter, whole.lr, whole.algo) == ("none", 1e-6, "dapo")
    assert (whole.rank, whole.alpha, whole.targets) == (
        16,
        32,
        "",
    )  # the defaults: no adapter reads them
    with pytest.raises(ValueError, match="leave --algo away"):
        parse(["--preset", "paper-grpo", "--algo", "dapo"])
    with pytest.raises(ValueError, match="leave --preset away"):
        parse(["--resume", "runs/x", "--preset", "paper-grpo"])


def test_help_shows_where_presets_differ_from_the_defaults(capsys):
    """Prevents: a preset that nobody can read without the source, or that repeats the defaults."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, values in PRESETS.items():
        assert f"{name}: " in shown
        for field, value in values.items():
            assert f"--{field.replace('_', '-')} {value}" in shown
            assert field == "algo" or getattr(Config(), field) != value


@pytest.mark.parametrize(
    ("old", "sentence"),
    [
        ("--updates", "--updates is no flag any more: use --minibatches"),
        ("--checkpointing", "use --recompute"),
        ("--lora=16", "use --adapter lora --rank"),
        ("--dora", "use --adapter dora --rank"),
        ("--live", "use --filter"),
        ("--merge", "use lora.save_merged"),
        ("--group_size", "--group_size is spelled --group-size"),
        ("--bogus", "--bogus is no flag: see --help"),
    ],
)
def test_an_old_flag_is_refused_with_the_new_one(old, sentence):
    """Prevents: a command of before that ends with "unrecognized arguments" and no way on."""
    with pytest.raises(ValueError, match=sentence):
        parse([old, "3"])


def test_a_run_folder_of_before_goes_on(tmp_path):
    """Prevents: a run of days that an update of this project makes useless."""
    record = Config(algo="dapo", minibatches=4, filter="reward", adapter="dora", rank=8).record()
    renamed = {"minibatches": "updates", "recompute": "checkpointing", "filter": "live"}
    old = {renamed.get(k, k): v for k, v in record.items() if k not in ("adapter", "rank")}
    old |= {"lora": 0, "dora": 8, "merge": True, "keep": 3, "updates": 4, "live": "reward"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = parse(["--resume", str(tmp_path)])
    assert config.record() == record | {"out": str(tmp_path)}


def test_settings_are_few():
    """Prevents: a card of options that nobody can hold in mind."""
    assert len(fields(Config)) <= 42
