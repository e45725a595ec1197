"""The README's table of results: `python data/results/table.py [RUN ...]`.

Greedy exact match in percent on each list of updates, then EM*, ES* and format (percent) on the
held-out libraries.

A run is a folder with `config.json` and `metrics.jsonl`; without arguments those beside this file.
"""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent


def read(folder: Path) -> dict:
    """Algorithm, filter, seed, grades, minutes and memory of one run."""
    config = json.loads((folder / "config.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    name = config["algo"].upper()
    if name == "DAPO":
        name += f", {config['live']} filter"
    if name != "SFT" and config["correctness"] != "em_star":
        name += f", {config['correctness']}"
    return {"name": name, "seed": config["seed"], **last}


def row(name: str, seed: str, runs: list[dict]) -> str:
    """One line of the table: means over `runs`, with the spread where there are several."""

    def value(when: str, split: str, key: str, form: str) -> str:
        found = [run["grade"][when][split][key] for run in runs]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 and key == "exact" else ""
        return format(statistics.mean(found), form) + spread

    cells = [
        value("before", "test", "exact", ".1f"),
        value("after", "test", "exact", ".1f"),
        value("after", "test_seen", "exact", ".1f"),
        value("after", "train", "exact", ".1f"),
        value("after", "test", "em_star", ".2f"),
        value("after", "test", "es_star", ".2f"),
        value("after", "test", "format", ".1f"),
        f"{statistics.mean(run['minutes'] for run in runs):.1f}",
        f"{max(run['memory_gb'] for run in runs):.1f}",
    ]
    return f"| {name} | {seed} | " + " | ".join(cells) + " |"


def main() -> None:
    folders = [Path(a) for a in sys.argv[1:]] or sorted(
        p.parent for p in HERE.glob("*/config.json")
    )
    runs = [run for run in map(read, folders) if "grade" in run]  # not those that were stopped
    print(
        "| algorithm | seed | before: held-out libraries | after: held-out libraries "
        "| new updates | training split | EM* | ES* | format | minutes | GB |"
    )
    print("|---" * 11 + "|")
    for name in sorted({run["name"] for run in runs}):
        group = sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])
        for run in group:
            print(row(name, run["seed"], [run]))
        if len(group) > 1:
            print(row(f"**{name}**", "mean", group))


if __name__ == "__main__":
    main()
