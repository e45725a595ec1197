"""Pass@k and UPass@k: samples in, run in the sandbox, what they add up to out.

    results = run_items(items, sampler, box, out, name)   # items: benchmarks.py
    print(summary(results, [1, 5]))

A sample passes if every unit test passes. Where the benchmark has updates, all tests run with the
update installed; a sample that passes then runs without it: UPass@k counts only those that need
the update. What could not be run, for want of a library or of memory, is no wrong answer: it is
left out and counted apart.
"""

import ast
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import sandbox
from sandbox import Box, Limits, Task, Verdict, benchmarks
from sandbox.benchmarks import Item

LIMITS = Limits(cpu=15, memory=8 << 30)  # seconds: what CodeUpdateArena gives a test; bytes
ROUND = 32  # items that are sampled, then run, together
Codes = list[str | None]  # the samples of one item; None: the answer held no code
# The samples of each item, and whether each has the form that was asked for.
Sampler = Callable[[list[Item]], list[tuple[Codes, list[bool]]]]

# ---- one sample ---------------------------------------------------------------------------------


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


def run_samples(item: Item, codes: Codes, box: Box, asked: list[bool] | None = None) -> Result:
    """Run every sample of one item; equal samples run once."""
    seen: dict[str | None, tuple[Verdict, str]] = {}
    for code in codes:
        if code not in seen:
            seen[code] = _run_sample(item, code, box)
    verdicts, without = zip(*(seen[code] for code in codes), strict=True)
    outcomes, reasons = zip(*((v.outcome, v.reason) for v in verdicts), strict=True)
    lists = (list(x) for x in (outcomes, reasons, without, codes, asked or []))
    return Result(item.id, item.package, item.kind, *lists)


def _run_sample(item: Item, code: str | None, box: Box) -> tuple[Verdict, str]:
    """The verdict with the update, and the outcome without it where that one is a pass."""
    if code is None:
        return Verdict("fail", "the answer holds no code"), ""
    box = dataclasses.replace(box, imports=libraries(item))
    program = benchmarks.program(item, code)
    rounds: list[list[Verdict]] = [[]]  # with the update, then without it

    def tasks() -> Iterator[Task]:
        for setup in (item.setup, item.without):
            for test in item.tests if setup is not None else ():
                yield Task(program, test, setup, item.calls, item.inout)
                if rounds[-1][-1].outcome != "pass":  # one test decides
                    return
            rounds.append([])

    for verdict in sandbox.run_all(tasks(), box):
        rounds[-1].append(verdict)
    unneeded = _overall(rounds[1]).outcome if len(rounds) > 1 and item.without is not None else ""
    return _overall(rounds[0]), unneeded


def _overall(verdicts: list[Verdict]) -> Verdict:
    """Of several tests: the first that is no pass, else a pass."""
    return next((v for v in verdicts if v.outcome != "pass"), Verdict("pass"))


def libraries(item: Item) -> tuple[str, ...]:
    """Modules outside the standard library that the benchmark's own code imports."""
    found = set()
    for code in (item.setup, item.without or "", *item.tests):
        for node in ast.walk(data.parsed(code)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
    return tuple(sorted(x for x in found if x.split(".")[0] not in sys.stdlib_module_names))


# ---- what samples add up to ---------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k of n samples passes, if c do: 1 - C(n-c, k) / C(n, k), unbiased.

    arXiv 2107.03374, equation 1. ValueError if k is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples an item, there are {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Estimate:
    """A mean over items, and the interval that holds it in 95 % of bootstrap resamples."""

    mean: float
    low: float
    high: float
    items: int


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
    n = c = 0
    forms = result.asked or [True] * len(result.verdicts)
    for verdict, without, form in zip(result.verdicts, result.without, forms, strict=True):
        unknown = needs_update and verdict == "pass" and without == "could-not-run"
        if asked and not form:
            n += 1
        elif verdict != "could-not-run" and not unknown:
            n += 1
            c += verdict == "pass" and not (needs_update and without == "pass")
    return n, c


def estimate(
    results: list[Result], k: int, needs_update: bool = False, asked: bool = True
) -> Estimate | None:
    """Pass@k (UPass@k: `needs_update`) over the items with k samples that ran; None if none has."""
    pairs = [counts(result, needs_update, asked) for result in results]
    values = [pass_at_k(n, c, k) for n, c in pairs if n >= k]
    return bootstrap(values) if values else None


def percent(found: Estimate) -> str:
    """A mean in percent with its interval."""
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def numbers(text: str, samples: int) -> list[int]:
    """The k of "1,5", in order. ValueError if one is none, or more than there are samples."""
    try:
        ks = sorted({int(k) for k in text.split(",")})
    except ValueError:
        raise ValueError(f"--k {text}: give numbers such as 1,5") from None
    if ks[0] < 1 or ks[-1] > samples:
        raise ValueError(f"--k {text}: the item with fewest samples has {samples}")
    return ks


def table(results: list[Result], ks: list[int], both: bool = False) -> str:
    """Markdown: all items, then by package and by kind of update where there are any.

    `both`: code in the asked form and in any form, side by side.
    """
    updates = any(result.package for result in results)
    columns = list(itertools.product((True, False)[: 1 + both], ks, (False, True)[: 1 + updates]))
    heads = [f"{'U' * u}Pass@{k}{'' if asked else ', any form'}" for asked, k, u in columns]
    lines = [f"| | items | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    groups = {"all": results}
    for name in ("package", "kind"):
        for value in sorted({getattr(r, name) for r in results} - {""}):
            groups[value] = [r for r in results if getattr(r, name) == value]
    for title, rows in groups.items():
        shares = [estimate(rows, k, u, asked) for asked, k, u in columns]
        cells = [percent(share) if share else "-" for share in shares]
        lines.append(f"| {title} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the file of results ------------------------------------------------------------------------


def read_results(path: Path, run: str) -> list[Result]:
    """What an interrupted run left in `path`; a half-written last line is cut off.

    `run` names the settings. ValueError if the file holds another run's results, or other things.
    """
    if not path.exists():
        return []
    results = []
    names = {f.name for f in dataclasses.fields(Result)}
    try:
        for where, row in data.json_lines(path, partial=True):
            if not names - {"asked"} <= row.keys():
                raise ValueError(f"{where}: no result")
            if row.get("run") != run:
                raise ValueError(f"{path} holds results of other data, samples or settings")
            row = {"asked": []} | row  # older files have none
            results.append(Result(**{name: row[name] for name in names}))
    except ValueError as error:
        raise ValueError(f"--out {error}; give a new file") from None
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        path.write_bytes(raw[: raw.rfind(b"\n") + 1])
    return results


def line(result: Result, run: str) -> str:
    return json.dumps(dataclasses.asdict(result) | {"run": run}) + "\n"


def fingerprint(**settings: object) -> str:
    """A short name of all that decides the results of a run."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- where samples come from --------------------------------------------------------------------

FIELDS = {"humaneval": ("task_id", "completion"), "codeupdatearena": ("id", "code")}


def predictions(benchmark: str, path: str, items: list[Item]) -> dict[str, Codes]:
    """The samples in a file of the benchmark's own format, or the reference solutions.

    Several lines of one id are several samples, in their order.
    """
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


# ---- the run ------------------------------------------------------------------------------------


def run_items(
    items: list[Item], sampler: Sampler, box: Box, out: Path | None, run: str
) -> list[Result]:
    """The results of all items, in their order: those in `out`, and the others run and added.

    ROUND items at a time are sampled, then run on all cores, so that a stopped run has lost no more
    than a round.
    """
    done = {result.id: result for result in read_results(out, run)} if out else {}
    todo = [item for item in items if item.id not in done]
    bar = tqdm(total=len(items), initial=len(done), unit="item", desc="run", dynamic_ncols=True)
    with bar, open(out or os.devnull, "a", encoding="utf-8") as file:
        for start in range(0, len(todo), ROUND):
            part = todo[start : start + ROUND]
            jobs = list(zip(part, *zip(*sampler(part), strict=True), strict=True))
            for _, result in sandbox.at_once(lambda job: run_samples(*job[:2], box, job[2]), jobs):
                done[result.id] = result
                file.write(line(result, run))
                file.flush()
                solved = sum("pass" in r.verdicts for r in done.values())
                bar.set_postfix_str(f"solved {solved / len(done):.0%}", refresh=False)
                bar.update()
    return [done[item.id] for item in items]


def check_interpreter(box: Box, items: list[Item]) -> None:
    """ValueError if nothing can be run; a line for each library that the items need and lack."""
    try:
        sandbox.Sandbox(box).close()
    except sandbox.Unavailable as error:
        raise ValueError(f"no program can be run: {error}") from None
    need = {item.id: libraries(item) for item in items}
    for name in sorted({x.split(".")[0] for names in need.values() for x in names}):
        try:
            sandbox.Sandbox(dataclasses.replace(box, imports=(name,))).close()
        except sandbox.Unavailable as error:
            count = sum(any(x.split(".")[0] == name for x in names) for names in need.values())
            print(f"{count} of {len(items)} items cannot be run: {error}", file=sys.stderr)


def summary(results: list[Result], ks: list[int], both: bool = False) -> str:
    """The table, and the count of what could not be run, with one reason."""
    text = table(results, ks, both)
    lost = [
        reason
        for r in results
        for verdict, reason in zip(r.verdicts, r.reasons, strict=True)
        if verdict == "could-not-run"
    ]
    note = f"\n{len(lost)} samples could not be run and are left out: {lost[0]}" if lost else ""
    return text + note
