"""What a run shows: tables, sample pages and curves.

    python -m upkeep.report [RUN ...]     the table of these run folders, or of data/results

All of it are views of the graded answers before and after training, and of `metrics.jsonl`.
"""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import data
from evaluate import Graded, Report, copied, means
from upkeep.metrics import rows

NAMES = "training split", "new updates", "held-out libraries", "harder questions", "updates of 2026"
LABELS = dict(zip(data.SPLITS, NAMES, strict=True))
SHOWN = 4  # examples in samples.md, and as many failures


def markdown(head: str, rows: Iterable[tuple]) -> str:
    """A table: its columns, with commas between them, and its rows."""
    columns = head.split(", ")
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def table(before: Report, after: Report) -> str:
    """Markdown: copying, the base and the trained policy, on training and held-out libraries."""
    rows = []
    for split in after:
        copies = copied([g.example for g in after[split]])
        told = {"copy the old code": copies, "base": before[split], "trained": after[split]}
        for who, graded in told.items():
            m = means(graded)
            shares = (f"{m[name]:.1f} %" for name in ("format", "copies", "exact"))
            worth = f"{m['em_star']:.2f}", f"{m['es_star']:.2f}", *shares
            rows.append((LABELS[split], len(graded), who, *worth))
    return markdown("updates, rows, policy, EM*, ES*, format, copies, exact", rows)


def samples(title: str, before: Report, after: Report) -> tuple[str, str]:
    """All of samples.md; and what a terminal shows of it, the first example and the table."""
    split = "test" if "test" in after else list(after)[-1]
    # The first ones of a split, then failures after training.
    missed = [i for i, graded in enumerate(after[split]) if not graded.exact]
    places = dict.fromkeys([*range(len(after[split]))[:SHOWN], *missed[:SHOWN]])
    pages = [example_page(before[split][i], after[split][i]) for i in places]
    overview = table(before, after)
    return f"# {title}\n\n{overview}\n\n" + "\n".join(pages), pages[0] + "\n" + overview


def example_page(old: Graded, new: Graded) -> str:
    """One example of samples.md: the note, the code, and what the policy said before and after."""
    example = new.example
    title = f"## {example.id or example.dependency}: {'right' if new.exact else 'WRONG'}"
    blocks = [title + " after training", example.update_info, "Old code:", fence(example.old_code)]
    blocks += ["Before:", fence("<think>" + old.text), "After:", fence("<think>" + new.text)]
    return "\n\n".join([*blocks, "True code:", fence(example.new_code)]) + "\n"


def fence(text: str) -> str:
    return f"~~~~\n{text.strip(chr(10))}\n~~~~"


PANELS = {
    "reward": "reward (mean, -3 to 3)", "exact": "exact match (share)",
    "copied": "copies of the old code (share)", "dead": "dead groups (share)",
    "length": "length (tokens)", "clipfrac": "clipped tokens (share)",
    "kl": "KL to the base (nats a token)", "grad_norm": "gradient norm", "loss": "loss",
}  # fmt: skip


def curves(path: Path, steps: list[dict]) -> None:
    """One panel per metric over the steps, reward first."""
    from matplotlib.figure import Figure

    names = [n for n in PANELS if any(m.get(n) for m in steps)]  # not what was never measured
    figure = Figure(figsize=(11, 5), dpi=110, layout="tight")
    axes = figure.subplots(2, math.ceil(len(names) / 2) or 1, squeeze=False)
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        values = [math.nan if m.get(name) is None else m[name] for m in steps]
        axis.plot([m["step"] for m in steps], values, linewidth=1.2)
        axis.set_title(PANELS[name], fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.savefig(path)


# ---- The table of several runs -------------------------------------------------------------------


def outcome(folder: Path) -> dict:
    """Name, seed, grades, minutes and memory of one run folder; no grades if it was stopped."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["algo"].upper()
    if name == "DAPO":
        name += f", {config.get('filter') or config['live']} filter"
    if name != "SFT" and config["correctness"] != "em_star":
        name += f", {config['correctness']}"
    return {"name": name, "seed": config["seed"], **(rows(folder) or [{}])[-1]}


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
    return markdown(head, lines)


if __name__ == "__main__":
    records = sorted(p.parent for p in (data.HERE / "results").glob("*/config.json"))
    print(results([Path(name) for name in sys.argv[1:]] or records))
