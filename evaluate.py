"""How good a policy is: its greedy answers, graded one by one.

    answers = greedy(load("", "cpu"), data.load(split="test"), max_new_tokens=384)
    means(answers)   -> {"em_star": -1.47, "es_star": 1.81, "format": 99.7, "exact": 1.0, ...}

A completion is parsed once; tables, sample pages and curves (`report.py`) are views of the records.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import ranks
import reward
from policy import Policy

ROWS = 64  # rows that are decoded together
HARD = 100  # rows of test_hard in a run's report, to save time: its programs are long
Report = dict[str, list["Graded"]]  # the graded answers of each split


@dataclass(frozen=True)
class Graded:
    """One answer and what it is worth."""

    example: data.Example
    text: str  # the completion, from right after the prompt's <think>
    format: float  # +1 or -1
    exact: bool  # the code equals the target's, comments and blank lines aside
    em: float  # EM*: 2, -1.5 or -2
    es: float  # ES*, in [-2, 2]
    copied: bool  # the code equals the old code, comments and blank lines aside


def grade(examples: list[data.Example], texts: list[str], device: str = "cpu") -> list[Graded]:
    """One record an answer, in order."""
    scored = reward.score(texts, [e.new_code for e in examples], "es_star", device)
    copied = reward.em_star(texts, [e.old_code for e in examples]) == 2
    columns = (scored[name].tolist() for name in ("format", "exact", "correctness"))
    graded = []
    for example, text, layout, exact, es, copy in zip(
        examples, texts, *columns, copied.tolist(), strict=True
    ):
        em = 2.0 if exact else -2.0 if es == -2 else -1.5  # ES* is -2 only without parsing code
        graded.append(Graded(example, text, layout, exact == 1, em, es, copy))
    return graded


def means(graded: list[Graded]) -> dict[str, float]:
    """Means over the rows: EM* and ES* in [-2, 2]; format, exact match and copies in percent.

    `copies` is the laziness that the paper is about: the old code, where something was to be done.
    """

    def mean(values) -> float:
        return torch.tensor(values, dtype=torch.float32).mean().item()

    return {
        "em_star": mean([g.em for g in graded]),
        "es_star": mean([g.es for g in graded]),
        "format": 50 * (mean([g.format for g in graded]) + 1),
        "exact": 100 * mean([g.exact for g in graded]),
        "copies": 100 * mean([g.copied and not g.exact for g in graded]),
    }


def greedy(
    policy: Policy, examples: list[data.Example], max_new_tokens: int, bar: tqdm | None = None
) -> list[Graded]:
    """The graded greedy answer to every example, in order; like lengths are decoded together.

    `bar` moves on by a row for each answer, and shows the share of exact ones so far.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].old_code))
    graded: dict[int, Graded] = {}
    for start in range(0, len(order), ROWS):
        places = order[start : start + ROWS]
        rows = [examples[i] for i in places]
        texts = policy.complete(rows, max_new_tokens=max_new_tokens)
        graded |= zip(places, grade(rows, texts, policy.model.device), strict=True)
        if bar is not None:
            share = sum(g.exact for g in graded.values()) / len(graded)
            bar.set_postfix_str(f"exact {share:.0%}", refresh=False)
            bar.update(len(rows))
    return [graded[i] for i in range(len(examples))]


def chosen(path: str, most: int) -> dict[str, list[data.Example]]:
    """A fixed choice of at most `most` rows of each split of a data file, of test_hard `HARD`."""
    # No run's seed: with that the rows here would be those that the run trains on first.
    splits = {name: data.load(path, name) for name in data.splits(path)}
    return {
        name: random.Random("report").sample(
            rows, min(most, len(rows), HARD if name == "test_hard" else most)
        )
        for name, rows in splits.items()
    }


def report(
    policy: Policy, rows: dict[str, list[data.Example]], max_new_tokens: int, title: str
) -> Report:
    """Graded greedy answers of a policy to the rows of each split, under a progress bar.

    An answer may have max_new_tokens, or as many as the longest true answer of its split.
    """
    longest = {
        name: max(policy.length(data.completion(e)) for e in examples)
        for name, examples in rows.items()
    }
    total, how = sum(map(len, rows.values())), {"disable": ranks.rank() > 0, "unit": "row"}
    with tqdm(total=total, desc=title, dynamic_ncols=True, **how) as bar:
        graded = {}
        for name, examples in rows.items():
            most = max(max_new_tokens, longest[name])
            graded[name] = ranks.gather(greedy(policy, ranks.share(examples), most, bar))
        return graded


WORTH = ("format", "exact", "em", "es", "copied")


def lines(report: Report) -> str:
    """One JSON object an answer: its split, its row's id, its text and what it is worth."""
    rows = []
    for split, graded in report.items():
        for g in graded:
            worth = {name: getattr(g, name) for name in WORTH}
            rows.append(json.dumps({"split": split, "id": g.example.id, "text": g.text} | worth))
    return "".join(row + "\n" for row in rows)


def read(path: Path, rows: dict[str, list[data.Example]]) -> Report | None:
    """What `lines` wrote of these very rows; None if the file is lost, damaged or of others."""
    if not path.is_file():
        return None
    wanted = [(split, example) for split in rows for example in rows[split]]
    graded: Report = {split: [] for split in rows}
    try:
        kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [(k["split"], k["id"]) for k in kept] != [(split, e.id) for split, e in wanted]:
            return None
        for k, (split, example) in zip(kept, wanted, strict=True):
            graded[split].append(Graded(example, k["text"], *(k[name] for name in WORTH)))
    except (ValueError, TypeError, KeyError):
        return None
    return graded


def copied(examples: list[data.Example]) -> list[Graded]:
    """What copying the old code is worth: every result must be read against it."""
    return grade(examples, [data.answer("", e.old_code) for e in examples])
