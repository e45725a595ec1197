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
    return {(line["split"], line["row"]): line for _, line in data.json_lines(file)}


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


def row(file: str, split: str, first: Answers | None) -> list:
    found = {name: line for name, line in read(file).items() if name[0] == split}
    found = {name: line for name, line in found.items() if line["run"] != "could-not-run"}
    if not found:
        return []
    moved = change(right, first, found) if first else []
    cells = [f"{file}: {split}", len(found), mean([right(line) for line in found.values()])]
    cells += [mean(moved), f"{moved.count(1)}, {moved.count(-1)}"] if moved else ["", ""]
    cells += [mean([copies(line) for line in found.values()])]
    return [*cells, mean(change(copies, first, found)) if moved else ""]


def table(files: list[str]) -> str:
    first = read(files[0])
    first = {name: line for name, line in first.items() if line["run"] != "could-not-run"}
    splits = dict.fromkeys(split for file in files for split, _ in read(file))
    rows = [row(f, split, first if i else None) for split in splits for i, f in enumerate(files)]
    heads = "answers, rows, right, change, gained and lost, copies, change of copies"
    return report.markdown(heads, filter(None, rows))


if __name__ == "__main__":
    print(table(sys.argv[1:]))
