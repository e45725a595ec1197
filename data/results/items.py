"""A benchmark's items under several policies, each compared item by item with the first file's.

    python data/results/items.py data/results/qwen/{untouched,cold1,grpo}/arena.jsonl

The files are what `evaluate.py codeupdatearena --out` and `humaneval --out` write. Pass@k and
UPass@k in percent, of code in any form, and in the asked form where one was asked for; a change
with the interval that holds it in 95 % of bootstrap samples of the items.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
from sandbox import passk  # noqa: E402
from upkeep import report  # noqa: E402

Values = dict[str, float]  # by item


def read(file: str) -> list[passk.Result]:
    rows = (row for _, row in data.json_lines(file))
    return [passk.Result(**{name: x for name, x in row.items() if name != "run"}) for row in rows]


def change(before: Values, after: Values) -> str:
    moved = passk.bootstrap([after[item] - before[item] for item in after if item in before])
    return f"{100 * moved.mean:+.1f} [{100 * moved.low:+.1f}, {100 * moved.high:+.1f}]"


def columns(results: list[passk.Result]) -> dict[str, tuple[int, bool, bool]]:
    """What can be told of such results: arguments of `passk.values`, by title."""
    ks = sorted({1, min(len(result.verdicts) for result in results)})
    found = {f"Pass@{k}": (k, False, False) for k in ks}
    if any(result.package for result in results):  # with updates
        found |= {f"UPass@{k}": (k, True, False) for k in ks}
    if any(result.asked and not all(result.asked) for result in results):
        found["Pass@1 in the asked form"] = 1, False, True
    return found


def table(files: list[str]) -> str:
    found = {file: read(file) for file in files}
    titles = columns([result for results in found.values() for result in results])
    first = {title: passk.values(found[files[0]], *how) for title, how in titles.items()}
    rows = []
    for file, results in found.items():
        cells = []
        for title, how in titles.items():
            now = passk.values(results, *how)
            mean = f"{100 * sum(now.values()) / len(now):.1f}"
            cells += [mean, "" if file == files[0] else change(first[title], now)]
        rows.append((file, len(results), *cells))
    return report.markdown(", ".join(["results, items", *(f"{t}, change" for t in titles)]), rows)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
