"""A run's numbers: what a step adds up, and `metrics.jsonl`, a line a step, last the grades."""

import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor

import data
from rollout import Rollout
from upkeep import ranks
from upkeep.machine import write


class Log:
    """The numbers of one turn of the loop: sums over parts, means over optimizer steps."""

    def __init__(self):
        self.begin, self.steps, self.skipped = time.time(), 0, 0
        self.sums = Counter()  # of the steps that are done
        self.running = Counter()  # of the parts of the step at work, of this rank
        self.scores: dict[str, list[Tensor]] = defaultdict(list)  # of each rollout

    def sampled(self, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Every sampled group counts, kept or not: the kept ones alone would flatter."""
        told = {name: getattr(rollout, name) for name in ("length", "truncated", "forwards")}
        for name, x in {**scores, **told, "surprise": -rollout.logp}.items():
            self.scores[name].append(x)

    def add(self, **numbers: float) -> None:
        """What one part adds to its step: the loss, and what the algorithm reports."""
        self.running.update(numbers)

    def loss(self) -> float:
        """The loss of the step at work, of all parts on all ranks."""
        parts, self.running = ranks.gather([self.running]), Counter()
        for part in parts:
            self.running.update(part)
        return self.running["loss"]

    def step(self, grad_norm: float, skipped: bool) -> None:
        """An optimizer step is done, or was skipped."""
        self.sums.update(self.running)
        self.sums["grad_norm"] += grad_norm
        self.steps, self.skipped, self.running = self.steps + 1, self.skipped + skipped, Counter()

    def close(self) -> dict[str, float]:
        """Reward first, loss last: on its own the loss says little (see grpo.loss)."""
        seconds, metrics = time.time() - self.begin, {}
        if self.scores:
            for name in [name for name in SAMPLED if name in self.scores]:
                values = torch.cat([x.float().flatten() for x in self.scores[name]])
                metrics["reward" if name == "total" else name] = values.mean().item()
            tokens, forwards, surprise = (
                sum(x.sum().item() for x in self.scores[name])
                for name in ("length", "forwards", "surprise")
            )
            metrics |= {"entropy": surprise / tokens, "tokens_per_s": tokens / seconds}
            if forwards < tokens:  # there were drafts
                metrics["tokens_per_forward"] = tokens / forwards
        means = {name: number / max(self.steps, 1) for name, number in self.sums.items()}
        loss = means.pop("loss", 0.0)
        return {**metrics, **means, "skipped": self.skipped, "seconds": seconds, "loss": loss}


SAMPLED = ("total", "exact", "copied", "format", "dead", "truncated", "length")  # what has a mean


class Metrics:
    """The file, and the event files of TensorBoard if they are asked for."""

    def __init__(self, folder: Path, tensorboard: bool = False, step: int = 0):
        self.file, self.board = folder / "metrics.jsonl", None
        if tensorboard and not ranks.rank():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard: run `pip install tensorboard` first") from None
            self.board = SummaryWriter(folder / "events", purge_step=step + 1)

    def append(self, row: dict) -> None:
        """One line; what is not finite is null, for JSON has no NaN."""
        if ranks.rank():
            return
        told = {k: v if type(v) is not float or math.isfinite(v) else None for k, v in row.items()}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        if self.board:
            for name in (name for name in row if name != "step"):
                self.board.add_scalar(name, row[name], row["step"])
            self.board.flush()


def rows(folder: Path) -> list[dict]:
    """Every whole line; ValueError names one that is damaged. A last one half written is none."""
    file, parsed = folder / "metrics.jsonl", []
    try:
        for where, row in data.json_lines(file, partial=True) if file.exists() else ():
            if type(row.get("step", 0)) is not int:
                raise ValueError(f"{where}: its step is no whole number")
            parsed.append(row)
    except ValueError as error:
        raise ValueError(f"{error}: delete that line to go on") from None
    return parsed


def history(folder: Path) -> list[dict]:
    """The steps of a run, without its grades."""
    return [row for row in rows(folder) if "step" in row]


def rewind(folder: Path, step: int) -> None:
    """Drop the metrics of steps after the checkpoint, and a line half written: made again."""
    kept = [row for row in rows(folder) if row.get("step", 0) <= step]
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
