"""Pass@k and UPass@k: samples in, run in the sandbox, what they add up to out.

A sample passes if every unit test passes. Where the benchmark has updates, all tests run with the
update installed; a sample that passes then runs without it: UPass@k counts only those that need
the update. What could not be run, for want of a library or of memory, is no wrong answer: it is
left out and counted apart.
"""

import ast
import itertools
import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import data
import sandbox
from sandbox import Box, Limits, Task, Verdict, benchmarks
from sandbox.benchmarks import Item

LIMITS = Limits(cpu=15, memory=8 << 30)  # seconds: what CodeUpdateArena gives a test; bytes
ROUND = 32  # items that are sampled, then run, together
Codes = list[str | None]  # the samples of one item; None: the answer held no code


@dataclass(frozen=True)
class Result:
    """One item's samples, and the verdict on each with the update and without it."""

    id: str
    package: str = ""
    kind: str = ""
    verdicts: list[str] = field(default_factory=list)  # pass, fail or could-not-run, by sample
    reasons: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)  # the same without the update; "": not run
    code: Codes = field(default_factory=list)  # in any form
    asked: list[bool] = field(default_factory=list)  # has the form asked for; []: all have


@contextmanager
def runner(box: Box) -> Iterator[Callable[[Task], Verdict]]:
    """A function from one task after another to its verdict, all in one sandbox."""
    tasks = deque()
    verdicts = sandbox.run_all(iter(tasks.popleft, None), box)  # takes a task when it is asked for
    with closing(verdicts):
        yield lambda task: tasks.append(task) or next(verdicts)


def run_samples(item: Item, codes: Codes, asked: list[bool], box: Box) -> Result:
    """Run every sample of one item; equal samples run once."""
    seen = {code: _run_sample(item, code, box) for code in dict.fromkeys(codes)}
    lists = map(list, zip(*(seen[code] for code in codes), strict=True))
    return Result(item.id, item.package, item.kind, *lists, codes, asked)


def _run_sample(item: Item, code: str | None, box: Box) -> tuple[str, str, str]:
    """(outcome with the update, its reason, outcome without it where the first is a pass)."""
    if code is None:
        return "fail", "the answer holds no code", ""
    program = benchmarks.program(item, code)
    with runner(replace(box, imports=libraries(item))) as run:

        def verdict(setup: str) -> Verdict:  # of all tests: the first that is no pass
            tests = (Task(program, test, setup, item.calls, item.inout) for test in item.tests)
            return next((v for v in map(run, tests) if v.outcome != "pass"), Verdict("pass"))

        found = verdict(item.setup)
        again = found.outcome == "pass" and item.without is not None
        return found.outcome, found.reason, verdict(item.without).outcome if again else ""


def libraries(item: Item) -> tuple[str, ...]:
    """Modules outside the standard library that the benchmark's own code imports."""
    codes = (item.setup, item.without or "", *item.tests)
    nodes = [node for code in codes for node in ast.walk(data.parsed(code))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {x.module for x in nodes if isinstance(x, ast.ImportFrom) and not x.level}
    return tuple(sorted(x for x in found if x.split(".")[0] not in sys.stdlib_module_names))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k of n samples passes, if c do: 1 - C(n-c, k) / C(n, k), unbiased.

    arXiv 2107.03374, equation 1. ValueError if k is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples an item, there are {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


class Estimate(NamedTuple):
    """A mean over items, and the interval that holds it in 95 % of bootstrap resamples."""

    mean: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"  # percent


def bootstrap(values: list[float], resamples: int = 2000) -> Estimate:
    """Mean of `values`, one an item, with a 95 % percentile interval over items drawn anew."""
    x = np.asarray(values, dtype=np.float64)
    places = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    low, high = np.quantile(x[places].mean(axis=1), (0.025, 0.975))
    return Estimate(float(x.mean()), float(low), float(high), len(x))


def counts(result: Result, needs_update: bool, asked: bool = True) -> tuple[int, int]:
    """(samples that could be run, samples that pass); `needs_update`: and fail without it.

    `asked`: a sample in another form than was asked for fails, whatever its code does.
    """
    outcomes = []
    forms = result.asked or [True] * len(result.verdicts)
    for verdict, without, form in zip(result.verdicts, result.without, forms, strict=True):
        if needs_update and verdict == "pass":
            verdict = {"pass": "fail", "fail": "pass"}.get(without, without)
        outcomes.append(verdict if form or not asked else "fail")
    return len(outcomes) - outcomes.count("could-not-run"), outcomes.count("pass")


def values(results: list[Result], k: int, needs_update=False, asked=True) -> dict[str, float]:
    """Pass@k (UPass@k: `needs_update`) of each item with k samples that ran, by its id."""
    pairs = {result.id: counts(result, needs_update, asked) for result in results}
    return {name: pass_at_k(n, c, k) for name, (n, c) in pairs.items() if n >= k}


def numbers(text: str, samples: int) -> list[int]:
    """The k of "1,5", in order. ValueError if one is none, or more than there are samples."""
    try:
        ks = sorted({int(k) for k in text.split(",")})
    except ValueError:
        raise ValueError(f"--k {text}: give numbers such as 1,5") from None
    if ks[0] < 1 or ks[-1] > samples:
        raise ValueError(f"--k {text}: the item with fewest samples has {samples}")
    return ks


def markdown(head: str, groups: dict[str, list], cells: Callable[[list], list]) -> str:
    """A table of this first line; of each group its name, its size and these cells."""
    rows = ([name, len(group), *cells(group)] for name, group in groups.items())
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines])


def table(results: list[Result], ks: list[int], both: bool = False) -> str:
    """Markdown: all items, by package and by kind; `both`: in the asked form and in any form."""
    updates = any(result.package for result in results)
    columns = list(itertools.product((True, False)[: 1 + both], ks, (False, True)[: 1 + updates]))
    heads = [f"{'U' * u}Pass@{k}{'' if asked else ', any form'}" for asked, k, u in columns]
    groups = {"all": results}
    for name in ("package", "kind"):
        for value in sorted({getattr(r, name) for r in results} - {""}):
            groups[value] = [r for r in results if getattr(r, name) == value]

    def cells(part: list[Result]) -> list:
        found = [list(values(part, k, u, asked).values()) for asked, k, u in columns]
        return [bootstrap(x) if x else "-" for x in found]

    return markdown(f"| | items | {' | '.join(heads)} |", groups, cells)


def summary(results: list[Result], ks: list[int], both: bool = False) -> str:
    """The table, and the count of what could not be run, with one reason."""
    pairs = [pair for r in results for pair in zip(r.verdicts, r.reasons, strict=True)]
    lost = [reason for verdict, reason in pairs if verdict == "could-not-run"]
    note = f"\n{len(lost)} samples could not be run and are left out: {lost[0]}" if lost else ""
    return table(results, ks, both) + note


def read_results(path: Path, run: str) -> list[Result]:
    """What an interrupted run left in `path`; a half-written last line is cut off.

    `run` names the settings. ValueError if the file holds another run's results, or other things.
    """
    if not path.exists():
        return []
    results = []
    try:
        for where, row in data.json_lines(path, partial=True):
            if row.pop("run", None) != run or "id" not in row:
                raise ValueError(f"{where}: no result of this run: other data, samples or settings")
            results.append(Result(**row))  # older files have no `asked`
    except ValueError as error:
        raise ValueError(f"--out {error}; give a new file") from None
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return results


def line(result: Result, run: str) -> str:
    return json.dumps(asdict(result) | {"run": run}) + "\n"


FIELDS = {"humaneval": ("task_id", "completion"), "codeupdatearena": ("id", "code")}


def predictions(benchmark: str, path: str, items: list[Item]) -> dict[str, Codes]:
    """The samples by id in a file of the benchmark's own format, or the reference solutions."""
    if path == "reference":
        return {item.id: [item.reference] for item in items}
    name, text = FIELDS[benchmark]
    known = {item.id for item in items}
    samples: dict[str, Codes] = {}
    for where, row in data.json_lines(path):
        if not isinstance(row.get(name), str) or not isinstance(row.get(text), str):
            raise ValueError(f"{where}: a prediction needs the text fields '{name}' and '{text}'")
        if row[name] not in known:
            raise ValueError(f"{where}: the benchmark's file has no item '{row[name]}'")
        samples.setdefault(row[name], []).append(row[text])
    if not samples:
        raise ValueError(f"--predictions {path}: no prediction in it")
    return samples


def run_items(
    items: list[Item], sampler: Callable, box: Box, out: str | Path, run: str
) -> list[Result]:
    """The results of all items, in their order: those in `out`, and the others run and added.

    `sampler(items)` gives, for each, its samples and which have the form asked for ([]: all have).
    ROUND items at a time are sampled, then run on all cores: no more is lost if it is stopped.
    """
    done = {result.id: result for result in read_results(Path(out), run)} if out else {}
    todo = [item for item in items if item.id not in done]
    bar = tqdm(total=len(items), initial=len(done), unit="item", desc="run", dynamic_ncols=True)
    with bar, open(out or os.devnull, "a", encoding="utf-8") as file:
        for start in range(0, len(todo), ROUND):
            part = todo[start : start + ROUND]
            jobs = [(item, *found) for item, found in zip(part, sampler(part), strict=True)]
            for _, result in sandbox.at_once(lambda job: run_samples(*job, box), jobs):
                done[result.id] = result
                file.write(line(result, run))
                file.flush()
                solved = sum("pass" in r.verdicts for r in done.values())
                bar.set_postfix_str(f"solved {solved / len(done):.0%}", refresh=False)
                bar.update()
    return [done[item.id] for item in items]


def check_interpreter(box: Box, items: list[Item]) -> None:
    """ValueError if nothing can be run; a line for each library that the items need and lack."""
    need = Counter(name for x in items for name in {lib.split(".")[0] for lib in libraries(x)})
    for name in ["", *sorted(need)]:
        try:
            sandbox.Sandbox(replace(box, imports=(name,) if name else ())).close()
        except sandbox.Unavailable as error:
            if not name:
                raise ValueError(f"no program can be run: {error}") from None
            print(f"{need[name]} of {len(items)} items cannot be run: {error}", file=sys.stderr)
