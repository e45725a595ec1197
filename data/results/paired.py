"""Answers of several policies to the same rows, each compared row by row with the first file's.

    python data/results/paired.py data/results/qwen/{cold,grpo}/answers.jsonl
    python data/results/paired.py --seeds data/results/qwen/{cold,grpo,cold1,grpo1}/answers.jsonl

Right is what ran rightly, where the file has verdicts of `--run`, else (and with `--exact`) what is
exact, in any form; a copy is the old code where something was to be done. Percent ± standard error
over rows. `--seeds`: before and after of each seed in turn; each row counts with its mean.
"""

import argparse
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


def exact(line: dict) -> bool:
    return line["exact_any"]


def copies(line: dict) -> bool:
    return line["copied_any"] and not line["exact_any"]


def mean(values: list[float]) -> str:
    """100 times the mean, ± its standard error."""
    error = statistics.pstdev(values) / len(values) ** 0.5
    return f"{100 * statistics.fmean(values):.1f} ± {100 * error:.1f}"


def change(of: Callable[[dict], bool], before: Answers, after: Answers) -> list[int]:
    return [of(after[row]) - of(before[row]) for row in after if row in before]


def row(title: str, found: Answers, first: Answers, good: Callable) -> list:
    """A line of the table; without changes where `first` has none of the rows."""
    rates = [mean([of(line) for line in found.values()]) for of in (good, copies)]
    moved, copied = (change(of, first, found) for of in (good, copies))
    if not moved:
        return [title, len(found), rates[0], "", "", rates[1], ""]
    gained = f"{moved.count(1)}, {moved.count(-1)}"
    return [title, len(found), rates[0], mean(moved), gained, rates[1], mean(copied)]


def mean_row(title: str, pairs: list[tuple[Answers, Answers]], good: Callable) -> list:
    """A line of the rows that all files have, each with its mean over the pairs."""
    rows = set.intersection(*(set(answers) for pair in pairs for answers in pair))
    cells = []
    for of in (good, copies):
        rates = [statistics.fmean(of(after[row]) for _, after in pairs) for row in rows]
        moved = [
            statistics.fmean(of(after[row]) - of(before[row]) for before, after in pairs)
            for row in rows
        ]
        cells += [mean(rates), mean(moved)]
    return [title, len(rows), *cells[:2], "", *cells[2:]]


def table(files: list[str], good: Callable = right, seeds: bool = False) -> str:
    answers = {file: read(file) for file in files}
    rows = []
    for split in dict.fromkeys(split for found in answers.values() for split, _ in found):
        parts = [
            {name: line for name, line in answers[file].items() if name[0] == split}
            for file in files
        ]
        if seeds:
            pairs = list(zip(parts[::2], parts[1::2], strict=True))
            rows.append(mean_row(f"mean of {len(pairs)}: {split}", pairs, good))
            continue
        for place, (file, part) in enumerate(zip(files, parts, strict=True)):
            first = parts[0] if place else {}
            rows += [row(f"{file}: {split}", part, first, good)] if part else []
    heads = "answers, rows, right, change, gained and lost, copies, change of copies"
    return report.markdown(heads, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="answers of evaluate.py updates")
    parser.add_argument("--seeds", action="store_true", help="FILEs: before and after of each seed")
    parser.add_argument("--exact", action="store_true", help="right is what is exact")
    options = parser.parse_args()
    if options.seeds and len(options.files) % 2:
        parser.error("--seeds needs two files of each seed: before, after, before, after ...")
    print(table(options.files, exact if options.exact else right, options.seeds))
