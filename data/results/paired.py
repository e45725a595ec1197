"""Answers of several policies to the same rows, each compared row by row with the first file's.

    python data/results/paired.py data/results/qwen/{cold,grpo}/answers.jsonl

Right is what ran rightly, where the file has verdicts of `--run`, else what is exact, in any form;
a copy is the old code where something was to be done. Percent ± standard error over rows.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
from upkeep import report  # noqa: E402

Answers = dict[tuple[str, str], dict]  # by split and row


def read(file: str) -> Answers:
    """All answers but those that could not be run."""
    lines = (line for _, line in data.json_lines(file) if line["run"] != "could-not-run")
    return {(line["split"], line["row"]): line for line in lines}


def right(line: dict) -> bool:
    return line["run"] == "right" if line["run"] else line["exact_any"]


def copies(line: dict) -> bool:
    return line["copied_any"] and not line["exact_any"]


def mean(values: list[int]) -> str:
    """100 times the mean, ± its standard error."""
    error = statistics.pstdev(values) / len(values) ** 0.5
    return f"{100 * statistics.fmean(values):.1f} ± {100 * error:.1f}"


def change(of: Callable[[dict], bool], before: Answers, after: Answers) -> list[int]:
    return [of(after[row]) - of(before[row]) for row in after if row in before]


def row(title: str, found: Answers, first: Answers) -> list:
    """A line of the table; without changes where `first` has none of the rows."""
    rates = [mean([of(line) for line in found.values()]) for of in (right, copies)]
    moved, copied = (change(of, first, found) for of in (right, copies))
    if not moved:
        return [title, len(found), rates[0], "", "", rates[1], ""]
    gained = f"{moved.count(1)}, {moved.count(-1)}"
    return [title, len(found), rates[0], mean(moved), gained, rates[1], mean(copied)]


def table(files: list[str]) -> str:
    answers = {file: read(file) for file in files}
    rows = []
    for split in dict.fromkeys(split for found in answers.values() for split, _ in found):
        for file, found in answers.items():
            first = {} if file == files[0] else answers[files[0]]
            part = {name: line for name, line in found.items() if name[0] == split}
            rows += [row(f"{file}: {split}", part, first)] if part else []
    heads = "answers, rows, right, change, gained and lost, copies, change of copies"
    return report.markdown(heads, rows)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
