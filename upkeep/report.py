"""What a run shows: tables, sample pages and curves.

    python -m upkeep.report [RUN ...]     the table of these run folders, or of data/results

All of it are views of two things: the graded answers before and after training (`evaluate.Report`,
a list of `Graded` for each split), and the rows of `metrics.jsonl`, one dictionary a step.
"""

import difflib
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

import data
import reward
from evaluate import Graded, Report, copied, means
from upkeep.metrics import history, rows
from upkeep.terminal import coloured

LABELS = {
    "train": "training split",
    "test_seen": "new updates",
    "test": "held-out libraries",
    "test_hard": "harder questions",
}

# ------------------------------------------------------------------------------------------------
# Before and after
# ------------------------------------------------------------------------------------------------


def table(before: Report, after: Report) -> str:
    """Markdown: copying, the base and the trained policy, on training and held-out libraries."""
    lines = [
        "| updates | rows | policy | EM* | ES* | format | copies | exact |",
        "|---" * 8 + "|",
    ]
    for split in after:
        rows = {
            "copy the old code": copied([g.example for g in after[split]]),
            "base": before[split],
            "trained": after[split],
        }
        for who, graded in rows.items():
            m = means(graded)
            lines.append(
                f"| {LABELS[split]} | {len(graded)} | {who} | {m['em_star']:.2f} "
                f"| {m['es_star']:.2f} | {m['format']:.1f} % | {m['copies']:.1f} % "
                f"| {m['exact']:.1f} % |"
            )
    return "\n".join(lines)


def kinds(before: Report, after: Report) -> str:
    """Markdown: which kinds of update come out right, over the rows that training never saw."""
    hits: dict[str, list[tuple[bool, bool]]] = {}
    for split in (name for name in after if name != "train"):
        for old, new in zip(before[split], after[split], strict=True):
            hits.setdefault(new.example.kind or "unnamed", []).append((old.exact, new.exact))
    lines = ["| kind of update | rows | base | trained |", "|---|---|---|---|"]
    for kind, pairs in sorted(hits.items(), key=lambda item: -len(item[1])):
        old, new = (
            f"{100 * sum(column) / len(pairs):.0f} %" for column in zip(*pairs, strict=True)
        )
        lines.append(f"| {kind} | {len(pairs)} | {old} | {new} |")
    return "\n".join(lines) if hits else ""


def samples(title: str, before: Report, after: Report) -> tuple[str, str]:
    """All of samples.md; and what a terminal shows of it, the first example and the table."""
    split = "test" if "test" in after else list(after)[-1]
    page, overview = sample_page(before[split], after[split]), table(before, after)
    parts = [f"# {title}", overview, kinds(before, after), page]
    return "\n\n".join(parts), page.partition("\n## ")[0] + "\n" + overview


def sample_page(before: list[Graded], after: list[Graded], count: int = 4) -> str:
    """Completions before and after: the first ones of a split, then failures after training."""
    missed = [i for i, graded in enumerate(after) if not graded.exact]
    places = dict.fromkeys([*range(min(count, len(after))), *missed[:count]])
    return "\n".join(example_page(before[i], after[i]) for i in places)


def example_page(old: Graded, new: Graded) -> str:
    """One example of samples.md: the note, the code, and what the policy said before and after."""
    example = new.example
    title = f"## {example.id or example.dependency}: {'right' if new.exact else 'WRONG'}"
    blocks = [title + " after training", example.update_info, "Old code:", fence(example.old_code)]
    blocks += ["Before:", fence("<think>" + old.text), "After:", fence("<think>" + new.text)]
    return "\n\n".join([*blocks, "True code:", fence(example.new_code)]) + "\n"


def fence(text: str) -> str:
    return f"~~~~\n{text.strip(chr(10))}\n~~~~"


def show(example: data.Example, text: str, scores: dict[str, Tensor]) -> None:
    """Print the first sample of a step: its note, its thought, its code as a diff, its reward."""
    names = ("format", "correctness", "total")
    parts = ", ".join(f"{name} {scores[name][0, 0]:+.2f}" for name in names)
    tqdm.write(f"\n{example.id or example.dependency}: {parts}\n{example.update_info}")
    tqdm.write(f"<think>{text.partition('</think>')[0].rstrip()} </think>")
    tqdm.write(difference(example.new_code, reward.extract_code(text)) + "\n")


def difference(target: str, code: str | None) -> str:
    """Where an answer's code leaves the target: minus is the target's line, plus the answer's."""
    if code is None:
        return "(no code block)"
    lines = difflib.unified_diff(target.split("\n"), code.split("\n"), lineterm="", n=1)
    return "\n".join(map(coloured, list(lines)[2:])) or "(the code of the target)"


PANELS = {
    "reward": "reward (mean, -3 to 3)",
    "exact": "exact match (share)",
    "copied": "copies of the old code (share)",
    "dead": "dead groups (share)",
    "length": "length (tokens)",
    "clipfrac": "clipped tokens (share)",
    "kl": "KL to the base (nats a token)",
    "grad_norm": "gradient norm",
    "loss": "loss",
}


def curves(path: Path, steps: list[dict]) -> None:
    """One panel per metric over the steps, reward first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    names = [n for n in PANELS if any(m.get(n) for m in steps)]  # not what was never measured
    figure, axes = pyplot.subplots(
        2, math.ceil(len(names) / 2) or 1, figsize=(11, 5), squeeze=False
    )
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        values = [math.nan if m.get(name) is None else m[name] for m in steps]
        axis.plot([m["step"] for m in steps], values, linewidth=1.2)
        axis.set_title(PANELS[name], fontsize=10)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------
# The table of several runs
# ------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict:
    """Name, seed, grades, minutes and memory of one run folder; no grades if it was stopped."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    last = rows(folder)[-1]
    name = config["algo"].upper()
    if name == "DAPO":
        name += f", {config.get('filter') or config['live']} filter"
    if name != "SFT" and config["correctness"] != "em_star":
        name += f", {config['correctness']}"
    return {"name": name, "seed": config["seed"], **last}


def results_row(name: str, seed: str, runs: list[dict]) -> str:
    """One line of the table: means over `runs`, with the spread where there are several."""

    def value(when: str, split: str, key: str, form: str) -> str:
        values = [run["grade"][when][split][key] for run in runs if split in run["grade"][when]]
        if not values:  # a run of before that split was made
            return "-"
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and key == "exact" else ""
        return format(statistics.mean(values), form) + spread

    cells = [
        value("before", "test", "exact", ".1f"),
        value("after", "test", "exact", ".1f"),
        value("after", "test_seen", "exact", ".1f"),
        value("after", "test_hard", "exact", ".1f"),
        value("after", "train", "exact", ".1f"),
        value("after", "test", "em_star", ".2f"),
        value("after", "test", "es_star", ".2f"),
        value("after", "test", "format", ".1f"),
        f"{statistics.mean(run['minutes'] for run in runs):.1f}",
        f"{max(run['memory_gb'] for run in runs):.1f}",
    ]
    return f"| {name} | {seed} | " + " | ".join(cells) + " |"


def results(folders: list[Path]) -> str:
    """Markdown: greedy exact match in percent on each split; EM*, ES* and format on held-out."""
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    runs = [run for run in map(outcome, folders) if "grade" in run]  # not those that were stopped
    lines = [
        "| algorithm | seed | before: held-out libraries | after: held-out libraries "
        "| new updates | harder questions | training split | EM* | ES* | format | minutes | GB |",
        "|---" * 12 + "|",
    ]
    for name in sorted({run["name"] for run in runs}):
        group = sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])
        lines += [results_row(name, run["seed"], [run]) for run in group]
        if len(group) > 1:
            lines.append(results_row(f"**{name}**", "mean", group))
    return "\n".join(lines)


def seeds(path: Path, folders: list[Path]) -> None:
    """One picture of several runs: how samples come right, and greedy answers before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2))
    names = sorted({outcome(folder)["name"] for folder in folders})
    for place, name in enumerate(names):
        colour, runs = f"C{place}", [f for f in folders if outcome(f)["name"] == name]
        for number, folder in enumerate(runs):
            steps = [row for row in history(folder) if "exact" in row]
            shares = [100 * row["exact"] for row in steps]
            label = name.partition(",")[0] if steps and not number else None
            left.plot([row["step"] for row in steps], shares, color=colour, alpha=0.7, label=label)
            grade = outcome(folder)["grade"]
            ends = [grade[when]["test"]["exact"] for when in ("before", "after")]
            shift = place + 0.12 * (number - (len(runs) - 1) / 2)
            right.plot([shift] * 2, ends, color=colour, alpha=0.4)
            right.plot(shift, ends[0], "o", color=colour, markerfacecolor="white")
            right.plot(shift, ends[1], "o", color=colour)
    left.set_title("samples that are right (%), training prompts", fontsize=10)
    left.set_xlabel("step")
    left.legend(frameon=False)
    right.set_title("held-out libraries, greedy (%)\nbefore: hollow, after: filled", fontsize=10)
    right.set_xticks(range(len(names)), [name.partition(",")[0] for name in names])
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    """The table of some run folders, of data/results if none is named; there also the picture."""
    records = sorted(p.parent for p in (data.HERE / "results").glob("*/config.json"))
    print(results([Path(name) for name in arguments] or records))
    if not arguments:
        seeds(data.HERE / "results" / "seeds.png", records)


if __name__ == "__main__":
    main(sys.argv[1:])
