"""What a run shows of its graded answers and of `metrics.jsonl`: tables, sample pages, curves."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import data
from evaluate import Graded, Report, copied, means

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
