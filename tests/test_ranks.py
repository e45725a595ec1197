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
from conftest import short_rows
from safetensors.torch import load_file

import ranks
import recode
import report
from config import Config

ROOT = Path(__file__).parent.parent
# Every setting of a run by its algorithm; three prompts for two ranks, and updates of few groups.
OWN = {"grpo": {"group_size": 4, "updates": 1}, "sft": {}}
OWN["dapo"] = OWN["grpo"] | {"max_refills": 1}
SCRIPT = """
import json, sys
import recode
from config import Config
for settings in json.loads(sys.argv[1]):
    recode.run(Config(**settings))
"""


@pytest.fixture
def runs(tmp_path):
    """The settings of a run of each algorithm, and their folders by the number of ranks."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(e)) + "\n" for e in short_rows()))
    common = dict(data=str(file), steps=1, prompts=3, max_new_tokens=128, eval_rows=1, threads=1)
    common |= {"device": "cpu"}

    def settings(algo: str, count: int) -> dict:
        return common | OWN[algo] | {"algo": algo, "out": str(tmp_path / f"{algo}-{count}")}

    return settings


def torchrun(tmp_path: Path, settings: list[dict], **how) -> subprocess.Popen:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), json.dumps(settings)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=tmp_path, env=env, **pipes, **how)


def test_two_ranks_are_one_run(tmp_path, runs):
    """Prevents: means of means over the ranks, other samples, or a rank that waits for ever when it
    has no live group."""
    both = torchrun(tmp_path, [runs(algo, 2) for algo in OWN])
    for algo in OWN:
        assert recode.main(Config(**runs(algo, 1))) == 0
    shown = both.communicate(timeout=300)[0]
    assert both.returncode == 0, shown
    for algo in OWN:
        one, two = (Path(runs(algo, count)["out"]) for count in (1, 2))
        for a, b in zip(report.history(one), report.history(two), strict=True):
            for name in a.keys() - {"seconds", "tokens_per_s"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (algo, name)
        # After one update AdamW's first moment is a tenth of the gradient. Not the weights: where a
        # gradient is nearly 0 its sign decides, and AdamW makes a whole step of it.
        moments, shared = (
            load_file(f / "checkpoint" / "optimizer.safetensors") for f in (one, two)
        )
        for name in (name for name in moments if name.endswith("exp_avg")):
            torch.testing.assert_close(10 * moments[name], 10 * shared[name], atol=1e-6, rtol=0)
        texts = [(f / "before.jsonl").read_text() for f in (one, two)]
        assert texts[0] == texts[1] and (two / "curves.png").stat().st_size > 1000
    assert any(row["grad_norm"] > 0.01 for row in report.history(Path(runs("grpo", 2)["out"])))


def test_ctrl_c_ends_all_ranks(tmp_path, runs):
    """Prevents: a rank that waits for ever for one that has gone."""
    config = runs("sft", 2) | {"steps": 10_000}
    both = torchrun(tmp_path, [config], start_new_session=True)
    metrics = Path(config["out"], "metrics.jsonl")
    end = time.time() + 240
    while time.time() < end and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.05)
    os.killpg(both.pid, signal.SIGINT)
    assert both.communicate(timeout=120)[0] is not None
    assert both.returncode != 0 and recode.checkpoint.newest(Path(config["out"])) is not None


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
