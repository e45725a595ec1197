"""evaluate.py and report.py: records of answers, and the views of them."""

import json
import math
import random
import sys
from dataclasses import replace

import pytest
import torch

import data
import evaluate
from upkeep import metrics, report, terminal


def test_copying_scores_high_and_matches_nothing():
    """Prevents: the copy baseline is forgotten: ES* rewards it, exact match does not."""
    rows = random.Random(0).sample(data.load(split="test"), 50)
    means = evaluate.means(evaluate.copied(rows))
    assert means["exact"] == 0 and means["format"] == 100 and means["es_star"] > 1


def test_grades_by_hand():
    """Prevents: EM* and ES* mixed up, or a share that is not in percent."""
    example = data.load()[0]
    good, wrong = data.answer("", example.new_code), data.answer("", example.new_code + "\nx")
    graded = evaluate.grade([example] * 4, [good, wrong, "nothing", data.answer("", "(")])
    assert [g.em for g in graded] == [2.0, -1.5, -2.0, -2.0]
    assert [g.exact for g in graded] == [True, False, False, False]
    assert [g.format for g in graded] == [1, 1, -1, 1]
    means = evaluate.means(graded)
    assert (means["em_star"], means["exact"], means["format"]) == (-3.5 / 4, 25.0, 75.0)


def test_right_in_any_form_by_hand():
    """Prevents: a base model that scores 0 for its form; lines of before refused at --resume."""
    row = data.load()[0]
    fenced = f"Sure!\n```py\n{row.new_code}\n```\nI hope this helps."
    lazy = f"\n</think>\n{row.old_code}\n# nothing to do"
    asked = data.answer("", row.new_code)
    graded = evaluate.grade([row] * 4, [asked, fenced, lazy, "no code"])
    assert [g.exact for g in graded] == [True, False, False, False]
    assert [g.exact_any for g in graded] == [True, True, False, False]
    assert [g.copied_any for g in graded] == [False, False, True, False]
    assert [g.asked for g in graded] == [True, False, False, False]
    means = evaluate.means(graded)
    assert (means["exact"], means["exact_any"], means["copies_any"]) == (25.0, 50.0, 25.0)
    titles, _, line = evaluate.breakdown({"test": graded}).splitlines()
    assert titles.endswith("| copies | exact | copies, any form | exact, any form |")
    cells = [cell.split(" [")[0] for cell in line.split(" | ")[5:]]
    assert cells == ["0.0", "25.0", "25.0", "50.0"]


def test_answers_of_before_any_form_are_graded_anew(tmp_path):
    """Prevents: a run whose before.jsonl is of an older version grades the base a second time."""
    rows = {"test": data.load(split="test")[:2]}
    graded = {"test": evaluate.copied(rows["test"])}
    old = [json.loads(line) for line in evaluate.lines(graded).splitlines()]
    assert [row.pop("exact_any") for row in old] == [False, False]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert evaluate.read(tmp_path / "a.jsonl", rows) == graded


def test_copies_count_where_something_was_to_be_done():
    """Prevents: an unchanged program that is right taken for laziness."""
    lazy = data.load()[0]
    nothing = replace(lazy, new_code=lazy.old_code)
    comment = data.answer("", lazy.old_code + "\n# the same")
    graded = evaluate.grade([lazy, nothing, lazy], [comment, comment, "no code"])
    assert [g.copied for g in graded] == [True, True, False]
    assert evaluate.means(graded)["copies"] == pytest.approx(100 / 3)


def test_answers_come_back_as_they_were_written(tmp_path):
    """Prevents: a resumed run reports other numbers for the base than the run that graded it."""
    rows = {"train": data.load()[:3], "test": data.load(split="test")[:2]}
    texts = ["\ud7ff \x85\u2028 odd", data.answer("", rows["train"][1].new_code), "c"]
    graded = {"train": evaluate.grade(rows["train"], texts), "test": evaluate.copied(rows["test"])}
    (tmp_path / "a.jsonl").write_text(evaluate.lines(graded), encoding="utf-8")
    assert evaluate.read(tmp_path / "a.jsonl", rows) == graded
    assert evaluate.read(tmp_path / "a.jsonl", {"train": rows["train"][:2]}) is None
    assert evaluate.read(tmp_path / "none.jsonl", rows) is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"split": "test"}', "\x00"])
def test_damaged_answers_are_graded_anew(tmp_path, damage):
    """Prevents: a KeyError at --resume for a line of before.jsonl, which can be made again."""
    rows = {"test": data.load(split="test")[:1]}
    (tmp_path / "a.jsonl").write_text(damage + "\n")
    assert evaluate.read(tmp_path / "a.jsonl", rows) is None


def test_metrics_have_null_for_what_is_not_finite(tmp_path):
    """Prevents: bare NaN in a file that other tools read as JSON."""
    metrics.Metrics(tmp_path).append({"step": 1, "loss": math.nan, "kl": math.inf, "reward": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "kl": None, "reward": 1.5
    }  # fmt: skip
    report.curves(tmp_path / "curves.png", metrics.history(tmp_path))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_tensorboard_is_asked_for_in_one_sentence(tmp_path, monkeypatch):
    """Prevents: a traceback for a package that nobody has to have."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        metrics.Metrics(tmp_path, tensorboard=True)


def test_a_damaged_line_of_metrics_has_a_number(tmp_path):
    """Prevents: --resume ends in a traceback, after the base was graded, for a line cut in two."""
    lines = ['{"step": 1}', "", '{"step": 2', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 3: .*delete that line"):
        metrics.rewind(tmp_path, 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": "1"}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 1: .*delete that line"):
        metrics.rewind(tmp_path, 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3')
    metrics.rewind(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_numbers_come_first_on_a_narrow_terminal():
    """Prevents: on 80 columns a bar of one character, and no reward."""
    metrics = dict.fromkeys(("reward", "exact", "dead", "length", "grad_norm", "loss"), 0.5)
    form = {"total": 300, "n": 12, "elapsed": 100, "ncols": 80, "prefix": "dapo"}
    bar = terminal.progress("dapo", 300, 0)
    shown = bar.format_meter(**form, bar_format=bar.bar_format, postfix=terminal.line(metrics))
    bar.close()
    assert len(shown) <= 80 and "reward +0.50, exact 50%, dead 50%" in shown


def test_a_diff_is_plain_where_nobody_sees_colours(monkeypatch):
    """Prevents: escape codes in a log file."""
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "")
    assert [terminal.coloured(line) for line in ("-b", "+c")] == [
        "\x1b[31m-b\x1b[0m",
        "\x1b[32m+c\x1b[0m",
    ]
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.coloured("+c") == "+c"


def test_entropy_is_the_surprise_of_a_token():
    """Prevents: a sum over padding, or over samples without their lengths."""
    from rollout import Rollout

    logp = torch.tensor([[[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]]])  # lengths 2 and 1
    length = torch.tensor([[2, 1]])
    rollout = Rollout([[1]], logp.long(), logp < 0, logp, length, length < 1, length)
    one = torch.ones(1, 2)
    names = ("total", "exact", "copied", "format", "dead")
    log = metrics.Log()
    log.sampled(rollout, dict.fromkeys(names, one))
    closed = log.close()
    assert closed["entropy"] == 2.0  # (1 + 2 + 3) / 3 tokens
    assert list(closed)[0] == "reward" and list(closed)[-1] == "loss"


# ---------------------------------------------------------------- answers in a file


def nameless(count: int) -> list[data.Example]:
    """Rows of the paper's own form: six fields, no id."""
    made = []
    for i in range(count):
        fields = ("lib", "==2.0", "It is renamed.", f"`old_{i}` is now `new_{i}`.")
        made.append(data.Example(*fields, f"lib.old_{i}(x)", f"lib.new_{i}(x)", split="test"))
    return made


def right(rows: list[data.Example]) -> list[evaluate.Graded]:
    return evaluate.grade(rows, [data.answer("", e.new_code) for e in rows])


@pytest.mark.parametrize("name", ["", "twin"])
def test_answers_find_their_rows_without_an_id(tmp_path, name):
    """Prevents: fourteen right answers read back as one, for rows without ids or with one id."""
    rows = [replace(e, id=name) for e in nameless(14)]
    rows.append(rows[0])  # and one that really stands in the data twice
    (tmp_path / "a.jsonl").write_text(evaluate.lines({"test": right(rows)[::-1]}))
    read = evaluate.answered(str(tmp_path / "a.jsonl"), {"test": rows})
    assert [(g.example, g.exact) for g in read["test"]] == [(e, True) for e in rows[::-1]]
    old = [json.loads(x) for x in evaluate.lines({"test": right(rows)}).splitlines()]
    assert all(x.pop("row") for x in old)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in old))
    with pytest.raises(ValueError, match="a.jsonl, line 1: several rows have this id, or none"):
        evaluate.answered(str(tmp_path / "a.jsonl"), {"test": rows})


def test_an_answer_counts_once(tmp_path):
    """Prevents: a file that stands in itself twice counts eight rows of four."""
    rows = [replace(e, id=f"row-{i}") for i, e in enumerate(nameless(4))]
    text = evaluate.lines({"test": right(rows)})
    (tmp_path / "a.jsonl").write_text(text + text)
    with pytest.raises(ValueError, match="line 5: a second answer to the same row"):
        evaluate.answered(str(tmp_path / "a.jsonl"), {"test": rows})
    (tmp_path / "a.jsonl").write_text(text)
    changed = [replace(rows[0], new_code="lib.better(x)"), *rows[1:]]  # the data was mended
    read = evaluate.answered(str(tmp_path / "a.jsonl"), {"test": changed})
    assert [g.exact for g in read["test"]] == [False, True, True, True]


ODD = "\ufeff\n\r\n{}\n \n{}\n"


def test_answers_are_read_like_any_json_lines(tmp_path):
    """Prevents: a byte order mark, a blank line or a raw U+2028 that --data takes, refused."""
    rows = [replace(e, id=f"row-{i}") for i, e in enumerate(nameless(2))]
    graded = {"test": evaluate.grade(rows, ["one\u2028two\x85", "\x0cthree"])}
    lines = [json.loads(line) for line in evaluate.lines(graded).splitlines()]
    raw = ODD.format(*(json.dumps(line, ensure_ascii=False) for line in lines))
    (tmp_path / "a.jsonl").write_text(raw, encoding="utf-8")
    assert evaluate.answered(str(tmp_path / "a.jsonl"), {"test": rows}) == graded
    assert evaluate.read(tmp_path / "a.jsonl", {"test": rows}) == graded


# ---------------------------------------------------------------- the command


def test_updates_are_graded_by_split_library_and_kind(small, tmp_path, capsys):
    """Prevents: another grader than that of a run; a split, a library or a kind that is lost."""
    out = tmp_path / "answers.jsonl"
    command = ["updates", "--model", small["model"], "--data", small["data"], "--device", "cpu"]
    assert evaluate.main([*command, "--max-new-tokens", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for name in ("train | 6", "test_seen | 4", "test | 4", "lib | 14", "function renamed | 14"):
        assert f"| {name} |" in shown
    assert (
        shown.count("0.0 [0.0, 0.0]") == 20
    )  # copies and exact, twice, of three splits, one library, kind
    assert len(out.read_text().splitlines()) == 14
    assert evaluate.main([*command, "--max-new-tokens", "2", "--rows", "3"]) == 0
    assert "| train | 3 |" in capsys.readouterr().out


def test_a_finished_split_is_on_the_disk_before_the_next(small, tmp_path, monkeypatch):
    """Prevents: all answers of an hour lost to one kill, as for want of memory in a later split."""
    out, greedy = tmp_path / "answers.jsonl", evaluate.greedy

    def killed(policy, examples, *how):
        if out.read_text():
            raise KeyboardInterrupt
        return greedy(policy, examples, *how)

    monkeypatch.setattr(evaluate, "greedy", killed)
    command = ["updates", "--model", small["model"], "--data", small["data"], "--device", "cpu"]
    assert evaluate.main([*command, "--max-new-tokens", "4", "--out", str(out)]) == 130
    assert len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "/no/such"], "no such folder"),
        (["--data", "/no/such"], "no such data file"),
        (["--split", "tset"], "no row of split 'tset'"),
        (["--answers", "/no/such", "--rows", "3"], "leave out --rows"),
        (["--rows", "-1"], "--rows is -1: give how many of each split, or 0 for all"),
        (["--device", "xpu:7"], "--device xpu:7: none on this machine"),
        (["--device", "nonsense"], "--device nonsense: none on this machine"),
    ],
)
def test_wrong_requests_are_one_sentence(small, flags, sentence, capsys):
    """Prevents: a traceback for a slip of the hand."""
    command = ["updates", "--model", small["model"], "--data", small["data"], "--device", "cpu"]
    assert evaluate.main([*command, "--max-new-tokens", "2", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["updates", "humaneval"])
def test_an_out_that_cannot_be_is_found_before_the_work(tmp_path, monkeypatch, command, capsys):
    """Prevents: an hour of answers lost, because nobody had made the folder for them."""
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("it began to work"))
    command = [command, "--data", str(tmp_path), "--out"]
    assert evaluate.main([*command, str(tmp_path / "none" / "a.jsonl")]) == 2
    assert "none/a.jsonl: there is no such folder, make it first" in capsys.readouterr().err
    assert evaluate.main([*command, str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(small, capsys):
    """Prevents: torch's AssertionError, after the data were read and the model was loaded."""
    for device in ("cuda", "cuda:0", "mps"):
        assert evaluate.main(["updates", "--data", small["data"], "--device", device]) == 2
        assert capsys.readouterr().err.startswith(f"evaluate.py: --device {device}: ")
