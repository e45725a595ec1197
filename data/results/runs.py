"""Several runs in one table: `python data/results/runs.py [RUN ...]`, of those beside this file."""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from upkeep import metrics, report  # noqa: E402


def outcome(folder: Path) -> dict:
    """Name, seed, grades, minutes and memory of one run folder; no grades if it was stopped."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["algo"].upper()
    if name == "DAPO":
        name += f", {config.get('filter') or config['live']} filter"
    if name != "SFT" and config["correctness"] != "em_star":
        name += f", {config['correctness']}"
    return {"name": name, "seed": config["seed"], **(metrics.rows(folder) or [{}])[-1]}


# Columns of the table: when a run was graded, on which split, and what of it.
COLUMNS = (
    *("before test exact", "after test exact", "after test_seen exact", "after test_hard exact"),
    *("after train exact", "after test em_star", "after test es_star", "after test format"),
)


def results_row(name: str, seed: str, runs: list[dict]) -> tuple:
    """One line of the table: means over `runs`, with the spread where there are several."""
    cells = []
    for when, split, key in map(str.split, COLUMNS):
        values = [run["grade"][when][split][key] for run in runs if split in run["grade"][when]]
        cell = f"{statistics.mean(values):.{2 if '_star' in key else 1}f}" if values else "-"
        spread = key == "exact" and len(values) > 1
        cells.append(cell + (f" ± {statistics.stdev(values):.1f}" if spread else ""))
    minutes = f"{statistics.mean(run['minutes'] for run in runs):.1f}"
    return name, seed, *cells, minutes, f"{max(run['memory_gb'] for run in runs):.1f}"


def results(folders: list[Path]) -> str:
    """Markdown: greedy exact match in percent on each split; EM*, ES* and format on held-out."""
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    runs = [run for run in map(outcome, folders) if "grade" in run]  # not those that were stopped
    lines = []
    for name in sorted({run["name"] for run in runs}):
        group = sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])
        lines += [results_row(name, run["seed"], [run]) for run in group]
        if len(group) > 1:
            lines.append(results_row(f"**{name}**", "mean", group))
    head = "algorithm, seed, before: held-out libraries, after: held-out libraries, new updates, "
    head += "harder questions, training split, EM*, ES*, format, minutes, GB"
    return report.markdown(head, lines)


if __name__ == "__main__":
    print(results([Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*/"))))
