"""Answers by execution: run in the release that their row is about, beside the true code.

    outcomes([(example, code), ...])   -> [Outcome("right"), Outcome("wrong", "NameError"), ...]

An answer is right if it ends without an error, prints exactly what the true code prints, warns of
no deprecation that the true code does not warn of (`verify.warnings_of_change`: on a line of its
own, or about a word of a line that differs from the true code), and has done the job: `guard.py`
says what is wrong with one that hides errors, leaves work out or prints constants. So an answer in
another spelling than the target is right; the old code is wrong, as `data/verify.py` has proved.

Output sees less than the string match: an answer that drops an argument is right, too, where the
program prints nothing that depends on it. Read the answers that are right without being exact.

Both run in the environment that `data/verify.py` makes for the row's new release, each in a process
of its own of one sandbox. Where that cannot be had, or the true code does not run in it, nothing is
said about the answer: "could-not-run".
"""

import asyncio
import collections
import contextlib
import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import sandbox
from data import Example
from sandbox import Box, Limits, Task, Verdict, guard

RIGHT, WRONG, UNKNOWN = "right", "wrong", "could-not-run"
# Whole outputs are compared, so that nothing may be cut; libraries map much more than they use.
LIMITS = Limits(cpu=60, memory=16 << 30, files=256, processes=256, output=1 << 20)
MARK = "\x1e"  # between what the program printed and its deprecations


class Outcome(NamedTuple):
    run: str  # RIGHT, WRONG or UNKNOWN
    reason: str = ""


NO_CODE = Outcome(WRONG, "the answer holds no code")
NO_ROW = Outcome(UNKNOWN, "its release is not known: it is no row of our own data")


def prepare(space: dict) -> None:
    """Runs in the sandbox before a program. Its source is all that the sandbox is handed."""
    import os
    import sys

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # logs have times in them: stdout alone counts
    sys.modules["__main__"] = sys.modules["program"]
    space |= {"__name__": "__main__", "__file__": os.path.abspath("main.py")}


PREPARE = inspect.getsource(prepare) + (
    "prepare(globals())\n_deprecations = []\nlisten(_deprecations, '<program>')\n"
    "del listen, prepare\n"
)
TELL = f"import json, sys\nprint({MARK!r} + json.dumps(_deprecations), file=sys.__stdout__)\n"


def outcomes(
    answers: list[tuple[Example, str | None]], envs: str = "", kind: str = ""
) -> list[Outcome]:
    """What came of each answer (row, and its code or None), in order, under a progress bar.

    Environments are kept in the folder `envs`, if it is given. `kind` of sandbox as in `Box`.
    ValueError where pyyaml or uv are missing.
    """
    rows, codes = releases(example for example, _ in answers), collections.defaultdict(list)
    for example, code in answers:
        if example in rows and code is not None and code not in codes[example]:
            codes[example].append(code)
    how = {"total": len(codes), "desc": "answers, run", "unit": "row", "dynamic_ncols": True}
    known = {
        (example, code): outcome
        for example, found in tqdm(by_release(rows, codes, envs, kind), **how)
        for code, outcome in found.items()
    }
    return [
        NO_CODE if code is None else known.get((example, code), NO_ROW) for example, code in answers
    ]


def by_release(
    rows: dict, codes: dict[Example, list[str]], envs: str, kind: str
) -> Iterator[tuple[Example, dict[str, Outcome]]]:
    """Each row with the outcomes of its codes: one environment after the other, rows at once."""
    wanted = {example: _verify().home(rows[example].new_release) for example in codes}
    for release in sorted(set(wanted.values())):
        part = [example for example in codes if wanted[example] == release]
        with interpreter(release, envs) as (python, fault):
            work = functools.partial(one_row, box=Box(python, kind, LIMITS), fault=fault)
            jobs = [(rows[example], codes[example]) for example in part]
            for index, found in sandbox.at_once(work, jobs):
                yield part[index], found


def releases(examples: Iterable[Example]) -> dict:
    """The `verify.Row` of each example that is a row of our own sources."""
    verify, found = _verify(), {}
    by_id = {example.id: example for example in examples}
    libraries = {example.dependency.lower() for example in by_id.values()}
    sources = (source for file in verify.RECORDS for source in verify.build.sources(file).items())
    for path in (path for library, paths in sources if library in libraries for path in paths):
        for row in verify.rows(path):
            example = by_id.get(row.id)
            if example and (example.old_code, example.new_code) == (row.old_code, row.new_code):
                found[example] = row
    return found


def _verify():
    """`data.verify`, which needs more than training does. ValueError says what is missing."""
    try:
        from data import verify
    except ImportError as error:
        raise ValueError(f"--run needs {error.name}: pip install pyyaml uv") from None
    return verify


@contextlib.contextmanager
def interpreter(release: tuple[str, ...], envs: str = "") -> Iterator[tuple[str, str]]:
    """(path of a Python that has this release, "" or why there is none).

    Made by uv, unless the folder `envs` has it from another time; kept there, or else removed.
    """
    verify = _verify()
    with tempfile.TemporaryDirectory(prefix="execute-") as scratch:
        folder = (Path(envs) if envs else Path(scratch)).resolve() / verify.digest(*release)
        if not (folder / "complete").exists() and not shutil.which("uv"):
            raise ValueError("--run makes environments with uv: pip install uv")
        fault = asyncio.run(verify.install(release, folder))
        name = ", ".join(release)
        yield str(folder / "bin" / "python"), fault and f"{name} is not installed: {fault}"


def one_row(job: tuple, box: Box, fault: str) -> dict[str, Outcome]:
    """The outcome of each code of one row, after its true code. `job`: a `verify.Row`, codes."""
    row, codes = job
    if fault:
        return dict.fromkeys(codes, Outcome(UNKNOWN, fault))
    with runner(replace(box, imports=_verify().modules(row))) as run:
        truth = run(row.new_code)
        if truth.outcome != "ok":
            why = f"the true code does not run in the sandbox: {truth.detail}"
            return dict.fromkeys(codes, Outcome(UNKNOWN, why))
        return {code: one_code(row, code, truth, run) for code in codes}


@contextlib.contextmanager
def runner(box: Box) -> Iterator[Callable]:
    """A function that runs one code after another, each in processes of its own of one sandbox."""
    tasks = collections.deque()
    verdicts = sandbox.run_all(iter(tasks.popleft, None), box)  # takes a task when it is asked for

    def run(code: str):
        own = f"open('main.py', 'w', encoding='utf-8').write({code!r})\n"  # pytest reads it again
        tasks.append(Task(code, TELL, own + _verify().LISTEN + PREPARE))
        return heard(next(verdicts), box)

    with contextlib.closing(verdicts):
        yield run


def one_code(row, code: str, truth, run: Callable) -> Outcome:
    """The outcome of one code, given the run of the true code and the runner of both."""
    found = compare(row._replace(old_code=code), truth, run(code))
    if found.run != RIGHT:
        return found
    try:
        if why := guard.shirks(row.old_code, row.new_code, code):
            return Outcome(WRONG, why)
    except SyntaxError:
        return Outcome(UNKNOWN, "its syntax is newer than that of the Python that checks it")
    for other, varied in guard.variations(row.old_code, row.new_code, code):
        expected = run(other)
        if expected.outcome == "ok" and expected.printed != truth.printed:
            # Run again, for what prints the time or a folder's name where its input is bad.
            if run(varied).printed != expected.printed == run(other).printed:
                return Outcome(WRONG, "on other inputs it prints otherwise")
    return found


def heard(verdict: Verdict, box: Box):
    """A verdict as a `verify.Run`: what the program printed, and the deprecations that it met."""
    printed, _, warned = verdict.output.rpartition(MARK)
    run = _verify().Run(verdict.outcome, verdict.reason.replace(str(home(box)), "ENV"))
    if verdict.outcome != "pass":
        return run
    try:
        return run._replace(outcome="ok", printed=printed, warned=json.loads(warned))
    except ValueError:
        return run._replace(outcome="fail", detail=f"it prints more than {LIMITS.output} bytes")


def home(box: Box) -> Path:
    """The folder of an environment: it differs between machines, so no reason may name it."""
    return Path(box.python).parent.parent


def compare(row, truth, run) -> Outcome:
    """The run of an answer, which stands as `row.old_code`, against that of the true code."""
    if run.outcome != "ok":
        return Outcome(UNKNOWN if run.outcome == UNKNOWN else WRONG, run.detail)
    if telling := next(_verify().warnings_of_change(row, truth, run), ""):
        return Outcome(WRONG, f"it warns: {telling}")
    return Outcome(RIGHT) if run.printed == truth.printed else Outcome(WRONG, "it prints otherwise")


def table(groups: dict[str, list], title: str = "split") -> str:
    """Markdown on graded answers that have `run` and `reason`, by split or another `title`.

    Shares are of the rows that could be run; an exact answer is right without a run. All but `any
    form` count code in the asked form. Copies are old code where something was to be done.
    """
    heads = title, "rows", "could not run", "right by execution", "the same, any form", "exact"
    lines = [f"| {' | '.join(heads)} | copies |", "|---" * 7 + "|"]
    for name, graded in groups.items():
        known = [g for g in graded if g.run != UNKNOWN]
        right = [g for g in known if g.run == RIGHT]
        asked, exact = sum(g.asked for g in right), sum(g.exact for g in known)
        copies = sum(g.copied and not g.exact for g in known)
        shares = (
            f"{n} ({100 * n / max(len(known), 1):.1f} %)"
            for n in (asked, len(right), exact, copies)
        )
        lines.append(
            f"| {name} | {len(graded)} | {len(graded) - len(known)} | {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def remarks(splits: dict[str, list]) -> str:
    """Which answers to read, and why some could not be run."""
    lines, reasons = [], collections.Counter()
    for name, graded in splits.items():
        ids = [g.example.id for g in graded if g.run == RIGHT and not g.exact_any]
        more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
        lines.append(f"Right, but not exact, {name}: {', '.join(ids[:10]) or 'none'}{more}")
        reasons.update(g.reason for g in graded if g.run == UNKNOWN)
    lines += [f"Could not run: {n} x {reason}" for reason, n in reasons.most_common()]
    return "\n".join(lines)
