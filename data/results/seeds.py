"""Draw seeds.png from the records beside this file: `python data/results/seeds.py`.

How samples come right in training, and greedy answers before it and after it.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
FOLDERS = sorted(HERE.glob("*-seed*"))
NAMES = sorted({folder.name.partition("-")[0].upper() for folder in FOLDERS})

figure = Figure(figsize=(9, 3.4), dpi=120, layout="tight")
left, right = figure.subplots(1, 2, width_ratios=(3, 2))
for folder in FOLDERS:
    name, _, seed = folder.name.upper().partition("-SEED")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    *rows, last = map(json.loads, lines)
    place = NAMES.index(name)
    colour, shift = f"C{place}", place + 0.12 * (int(seed) - 1)
    if "exact" in rows[0]:  # it samples
        shares = [100 * row["exact"] for row in rows]
        label = name if seed == "0" else None
        left.plot([row["step"] for row in rows], shares, color=colour, alpha=0.7, label=label)
    ends = [last["grade"][when]["test"]["exact"] for when in ("before", "after")]
    right.plot([shift] * 2, ends, color=colour, alpha=0.4)
    right.plot(shift, ends[0], "o", color=colour, markerfacecolor="white")
    right.plot(shift, ends[1], "o", color=colour)
left.set_title("samples that are right (%), training prompts", fontsize=10)
left.set_xlabel("step")
left.legend(frameon=False)
right.set_title("held-out libraries, greedy (%)\nbefore: hollow, after: filled", fontsize=10)
right.set_xticks(range(len(NAMES)), NAMES)
for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(HERE / "seeds.png")
