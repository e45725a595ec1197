"""How a terminal shows things: a progress bar, a step in one line, the lines of a diff."""

import os
import sys

from tqdm import tqdm


def progress(title: str, steps: int, done: int, quiet: bool = False) -> tqdm:
    """A bar that says the numbers first: on a narrow terminal the bar is what gives way."""
    form = "{desc} {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}] {bar}"
    how = {"bar_format": form, "dynamic_ncols": True, "disable": quiet}
    return tqdm(total=steps, initial=done, desc=title, **how)


def line(metrics: dict) -> str:
    """What the progress bar shows of a step, reward first."""
    forms = {
        "reward": "reward {:+.2f}", "exact": "exact {:.0%}", "dead": "dead {:.0%}",
        "length": "length {:.0f}", "grad_norm": "grad {:.2f}", "loss": "loss {:+.3f}",
    }  # fmt: skip
    if "reward" in metrics:
        del forms["loss"]  # it says little beside the reward
    return ", ".join(form.format(metrics[n]) for n, form in forms.items() if n in metrics)


def coloured(text: str) -> str:
    """A line of a diff, green or red on a terminal, plain elsewhere and where NO_COLOR is set."""
    colour = {"+": "\x1b[32m", "-": "\x1b[31m"}.get(text[:1])
    plain = colour is None or os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else f"{colour}{text}\x1b[0m"
