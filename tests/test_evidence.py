"""The ablations of the results page: each table's runs, made short, and what is handed to them."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import recode
import variants
from rollout import written
from upkeep import metrics

RESULTS = Path(data.HERE) / "results"


def script(name: str):
    """A program beside the results page, as a module."""
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evidence, paired, items = script("evidence"), script("paired"), script("items")

SHORT = {"steps": 1, "prompts": 2, "max_new_tokens": 8}


# One row of each table, and those that are handed a reward or a loss of their own.
ROWS = [
    ("reward", "(ES + EM) / 2, the mix of GAPO"),
    ("reward", "control: random"),
    ("loss", "... and clip-higher alone"),
    ("loss", "GRPO without KL, dynamic sampling alone"),
    ("group", "4 minibatches"),
    ("kl", "k2 in the loss, 1"),
    ("kl", "k1 in the reward, 1"),
    ("long", "SFT, 100 steps"),
]


@pytest.mark.parametrize("table, name", ROWS)
def test_a_row_of_each_table_is_made(tiny, tmp_path, monkeypatch, table, name):
    """Prevents: a table that only the machine it was made on can make again; a row that leaves its
    reward or loss in place for the next one."""
    monkeypatch.setattr(evidence.run, "check_rows", lambda *_: None)  # it reads all answers
    short = SHORT if table == "long" else SHORT | {"group_size": 2}  # imitation has no groups
    row, loop = evidence.TABLES[table][name], (recode.score, variants.of)
    line = evidence.made(row, 0, str(tmp_path / "answers.gz"), most=2, model=str(tiny), **short)
    assert (recode.score, variants.of) == loop
    assert line["run"] == evidence.named(row) and len(line["steps"]) == 1
    for column, (_, value) in evidence.COLUMNS.items():
        assert value(line) >= (-1e-6 if column == "KL" else 0)
    answers = [row for _, row in data.json_lines(tmp_path / "answers.gz")]
    splits = ["test", "test_seen", "test_hard", "no_change"]
    assert [row["split"] for row in answers] == [name for name in splits for _ in range(2)]
    assert [len(line["rows"][name]) for name in splits] == [2] * 4 and line["samples"] >= 2
    shown = evidence.table(table, {(line["run"], 0): line})
    assert sum(" | 1 | " in row and name in row for row in shown.split("\n")) == 1
    assert len({row.count("|") for row in shown.split("\n")}) == 1  # a column has one head


def test_the_usual_error_is_the_median_of_the_rows(monkeypatch):
    """Prevents: three seeds that agree by luck make any difference a finding; a row that stands in
    two tables, or lacks a seed, counts."""
    seeds = {"EM*": (1, 2, 3), "ES*": (0, 0, 3), "EM_copy": (5, 5, 5), "control: random": (0, 9)}
    known = {
        (evidence.named(evidence.TABLES["reward"][name]), seed): {"x": x}
        for name, values in seeds.items()
        for seed, x in enumerate(values)
    }
    monkeypatch.setattr(evidence, "COLUMNS", {"x": (2, lambda line: line["x"])})
    # Standard deviations 1, sqrt(3) and 0, of means of three 1 / sqrt(3) = 0.577, 1 and 0.
    assert evidence.usual(known).split("\n")[2:] == ["|  | 3 | 0.58 |"]
    assert "| EM* | 3 | 2.00 ± 0.58 |" in evidence.table("reward", known).split("\n")


def test_what_is_done_is_kept_whatever_ends_the_rest(tmp_path, monkeypatch):
    """Prevents: half a line of a kill spoils the file for good; after one failure the others train
    for hours and are thrown away."""
    begun = []

    def apart(job):
        begun.append(job)
        time.sleep(0.2)
        if job[1] == 1:
            raise ValueError("it diverged")
        return {"run": evidence.named(job[0]), "seed": job[1]}

    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "apart", apart)
    (tmp_path / "runs.jsonl").write_text('{"run": "{}", "seed": 7}\n{"run": "{')
    with pytest.raises(ValueError, match="it diverged"):
        evidence.make([({}, seed) for seed in (0, 1, *range(10, 30))], jobs=1)
    assert {("{}", 7), ("{}", 0)} <= evidence.records().keys()
    assert len(begun) < 22


CODE = "a = 1\nprint(a)"
EXAMPLE = data.Example("lib", "1", "d", "u", "a = 1", CODE)


def told(code: str) -> str:
    return data.answer("So.", code)


def test_rewards_that_do_not_ask_for_syntax():
    """Prevents: a reward "whether it parses or not" that still pays a syntax error nothing.

    Target "a = 1\\nprint(a)", 14 characters. Without its last bracket 1 of 14 differs:
    ES = 13 / 14, 3.5 * 13 / 14 - 1.5 = 1.75. EM is -1.5 there, the mean of both 0.125.
    """
    texts = [told(CODE), told(CODE[:-1])]
    assert evidence.em(texts, [EXAMPLE] * 2) == [2.0, -1.5]
    assert evidence.es(texts, [EXAMPLE] * 2) == pytest.approx([2.0, 1.75])
    assert evidence.half(texts, [EXAMPLE] * 2) == pytest.approx([2.0, 0.125])


def test_k1_in_the_reward_is_summed_over_the_answer(monkeypatch):
    """Prevents: a mean in its place, a hundredth of what verl takes off; a wrong sign.

    Two tokens, each 0.1 nats likelier than under the base, then two 0.2 less likely: 2 - 0.2 and
    -1.5 + 0.4, for the answers are right and wrong.
    """
    rollout = written([[1]], [[[5, 6], [7, 8]]], pad_id=0, device="cpu")  # logp is 0
    base = torch.tensor([[[-0.1, -0.1], [0.2, 0.2]]])
    monkeypatch.setattr(evidence, "scored", lambda *_: base)
    worth = evidence.k1([told(CODE), told("a = 2")], [EXAMPLE] * 2, rollout=rollout, base=None)
    assert worth == pytest.approx([1.8, -1.1])


def test_the_random_reward_knows_nothing_of_the_answer():
    """Prevents: a control that rewards something after all, or differs from run to run."""
    texts = [told(CODE)] * 4000
    worth = evidence.chance(texts, [EXAMPLE] * 4000, seed=1, step=2)
    assert worth == evidence.chance(["x"] * 4000, [EXAMPLE] * 4000, seed=1, step=2)
    assert worth != evidence.chance(texts, [EXAMPLE] * 4000, seed=1, step=3)
    # 15 % of 4000 are 600, give or take five standard deviations of sqrt(4000 * .15 * .85) = 22.6
    assert set(worth) == {2.0, -1.5} and abs(worth.count(2.0) - 600) < 113


def test_the_control_of_a_run_draws_its_reward_and_goes_on_where_it_was(tiny, tmp_path):
    """Prevents: a control that is paid for its code; one that draws its first rewards again when it
    is resumed. A random model has no form, -1, so that each sample earns 1 or -2.5."""
    row = data.json_lines(Path(data.HERE) / "updates.jsonl")
    short = next(row)[1] | {"description": "So.", "old_code": "a = 1", "new_code": "b = 1"}
    (tmp_path / "rows").write_text(json.dumps(short | {"split": "train"}) + "\n")
    options = f"--algo grpo --model {tiny} --data {tmp_path}/rows --prompts 2 --max-new-tokens 64"
    options += " --eval-rows 0 --device cpu --threads 1"
    program = [sys.executable, str(RESULTS / "control.py")]
    runs = [f"{tmp_path}/whole", f"{tmp_path}/parts"]
    for steps, folder in zip("21", runs, strict=True):
        flags = [*options.split(), "--steps", steps, "--out", folder]
        subprocess.run([*program, *flags], check=True)
    subprocess.run([*program, "--resume", runs[1], "--steps", "2"], check=True)
    whole, parts = ([s["reward"] for s in metrics.history(Path(run))] for run in runs)
    assert whole == parts and len(whole) == 2 and whole[0] != whole[1]
    paid = [(reward + 2.5) * 16 / 3.5 for reward in whole]  # of the 16 samples
    assert all(abs(count - round(count)) < 1e-4 for count in paid)


def test_answers_are_compared_row_by_row(tmp_path):
    """Prevents: a change taken from other rows than both files have, or a sign turned round.

    Of three rows the second file gets one that the first had not, and loses none: +1/3 = 33.3 %,
    with deviation sqrt(1/3 - 1/9) = 0.471 and error 0.471 / sqrt(3) = 27.2 %.
    """
    names = ["run", "exact_any", "copied_any"]
    first = [("", True, False), ("", False, True), ("wrong", False, False), ("right", False, False)]
    second = [("", True, False), ("right", False, True), ("wrong", True, False)]
    for name, answers in (("a", first), ("b", second)):
        rows = [dict(zip(names, row, strict=True)) for row in answers]
        lines = [{"split": "test", "row": str(i), **row} for i, row in enumerate(rows)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    *_, a, b = paired.table([str(tmp_path / "a"), str(tmp_path / "b")]).split("\n")
    # a: 2 of 4 right, 1 copy. b: 2 of 3; what ran rightly is right though it is a copy of the old
    assert a.split(" | ")[1:] == ["4", "50.0 ± 25.0", "", "", "25.0 ± 21.7", " |"]
    assert b.split(" | ")[1:4] == ["3", "66.7 ± 27.2", "33.3 ± 27.2"]
    assert b.split(" | ")[4] == "1, 0"


def test_seeds_are_averaged_row_by_row(tmp_path):
    """Prevents: seeds counted as if each had rows of its own, so that the error is too small; a
    change against another seed's start; verdicts used where exact match is asked for.

    Row 0 is right before in neither seed and after in both, row 1 after in the second alone. Rows'
    means after: 1 and 0.5, so 75 ± 25 / sqrt 2 = 17.7; changes 1 and 0.5, the same. Exact: none.
    """
    both = {"exact_any": False, "copied_any": False, "split": "test"}
    files = []
    for name, verdicts in (("a", "xx"), ("b", "+x"), ("c", "xx"), ("d", "++")):
        runs = [
            {"run": "right" if v == "+" else "wrong", "row": str(i)} for i, v in enumerate(verdicts)
        ]
        files.append(str(tmp_path / name))
        (tmp_path / name).write_text("".join(json.dumps(both | run) + "\n" for run in runs))
    shown = paired.table(files, seeds=True).split("\n")
    assert shown[2:] == [
        "| mean of 2: test | 2 | 75.0 ± 17.7 | 75.0 ± 17.7 |  | 0.0 ± 0.0 | 0.0 ± 0.0 |"
    ]
    assert " | 2 | 0.0 ± 0.0 | 0.0 ± 0.0 | " in paired.table(files, paired.exact, seeds=True)


def test_items_of_a_benchmark_are_compared_one_by_one(tmp_path):
    """Prevents: a change over other items than both files have; a pass that needs no update, or
    not in the asked form, counted where it must not be.

    Of item x 1 of 2 samples passes, then both, one of which needs the update: Pass@1 50 -> 100,
    Pass@2 100 -> 100, UPass@1 50 -> 50. Of y none ever does: means 25 -> 50, 50 -> 50, 25 -> 25.
    Every bootstrap sample of the two changes, 50 and 0, is between them.
    """
    for name, of_x, without in (("a", "pass fail", "fail "), ("b", "pass pass", "fail pass")):
        x = dict(id="x", package="p", verdicts=of_x.split(), without=without.split(" "))
        y = dict(id="y", package="p", verdicts=["fail"] * 2, without=["", ""])
        other = dict(code=["", ""], asked=[name == "b", False], run="1", reasons=["", ""])
        (tmp_path / name).write_text("".join(json.dumps(row | other) + "\n" for row in (x, y)))
    head, _, a, b = items.table([str(tmp_path / "a"), str(tmp_path / "b")]).split("\n")
    assert head.split(" | ")[2::2][:4] == ["Pass@1", "Pass@2", "UPass@1", "UPass@2"]
    assert a.split(" | ")[1:] == ["2", "25.0", "", "50.0", "", "25.0", "", "50.0", "", "0.0", " |"]
    pass_1, pass_2, needs_it, _, asked = b.split(" | ")[3::2]
    assert pass_1 == "+25.0 [+0.0, +50.0]" and pass_2 == needs_it == "+0.0 [+0.0, +0.0]"
    assert asked == "+25.0 [+0.0, +50.0] |"


def test_estimates_of_the_kl_by_hand():
    """Prevents: a wrong sign or factor, and a k1 in the loss that holds something back.

    One token, adv 0, weight 1, beta 0.5, logp - ref_logp = 0.2. k1 adds 0.5 * 0.2 = 0.1 and its
    gradient in logp is 0.5, whatever the gap; k2 adds 0.5 * 0.2^2 / 2 = 0.01, gradient 0.5 * 0.2.
    """
    for name, value, slope in (("k1", 0.1, 0.5), ("k2", 0.01, 0.1)):
        logp = torch.tensor([[-1.0]], requires_grad=True)
        loss, _ = evidence.LOSSES[name].loss(
            logp, logp.detach(), torch.zeros(1, 1), torch.ones(1, 1),
            clip=0.2, beta=0.5, ref_logp=torch.tensor([[-1.2]]),
        )  # fmt: skip
        loss.backward()
        assert loss.item() == pytest.approx(value) and logp.grad.item() == pytest.approx(slope)
