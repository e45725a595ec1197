"""Answers by execution: run in the release that their row is about, beside the true code.

    outcomes([(example, code), ...])   -> [Outcome("right"), Outcome("wrong", "NameError"), ...]

An answer is right if it ends without an error, prints exactly what the true code prints, warns of
no deprecation that the true code does not warn of (`verify.warnings_of_change`), and has done the
job (`guard.py`). So another spelling of the target is right; the old code is wrong, as
`data/verify.py` has proved. Output sees less than the string match: an answer that drops an
argument is right where nothing printed depends on it. Read what is right without being exact.

Both run in the environment that `data/verify.py` makes for the row's new release, each in a process
of its own of one sandbox. Where that cannot be had, or the true code does not run in it, nothing is
said about the answer: "could-not-run".
"""

import asyncio
import collections
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import sandbox
from data import Example
from sandbox import Box, Limits, Task, Verdict, guard, passk

try:
    from data import verify
except ImportError as error:  # it needs more than training does
    raise ValueError(f"--run needs {error.name}: pip install pyyaml uv") from None

RIGHT, WRONG, UNKNOWN = "right", "wrong", "could-not-run"
# Whole outputs are compared, so that nothing may be cut; libraries map much more than they use.
LIMITS = Limits(cpu=60, memory=16 << 30, files=256, processes=256, output=1 << 20)
MARK = "\x1e"  # between what the program printed and its deprecations


class Outcome(NamedTuple):
    run: str  # RIGHT, WRONG or UNKNOWN
    reason: str = ""


NO_CODE = Outcome(WRONG, "the answer holds no code")
NO_ROW = Outcome(UNKNOWN, "its release is not known: it is no row of our own data")

PREPARE = """
import os, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # logs have times in them: stdout alone counts
sys.modules["__main__"] = sys.modules["program"]
__name__, __file__, _deprecations = "__main__", os.path.abspath("main.py"), []
listen(_deprecations, "<program>")
del listen, os, sys
"""
TELL = f"import json, sys\nprint({MARK!r} + json.dumps(_deprecations), file=sys.__stdout__)\n"


def outcomes(
    answers: list[tuple[Example, str | None]], envs: str = "", kind: str = ""
) -> list[Outcome]:
    """What came of each answer (row, and its code or None), in order, under a progress bar.

    One environment after the other, its rows at once; kept in the folder `envs`, if one is given.
    """
    rows, known = releases([example for example, _ in answers]), {}
    codes: dict[Example, list[str]] = collections.defaultdict(list)
    for example, code in answers:
        if example in rows and code is not None and code not in codes[example]:
            codes[example].append(code)
    homes = {example: verify.home(rows[example].new_release) for example in codes}
    with tqdm(total=len(codes), desc="answers, run", unit="row", dynamic_ncols=True) as bar:
        for release in sorted(set(homes.values())):
            part = [example for example in codes if homes[example] == release]
            with interpreter(release, envs) as (python, fault):
                box = Box(python, kind, LIMITS)
                jobs = [(rows[example], codes[example], box, fault) for example in part]
                for index, found in sandbox.at_once(lambda job: one_row(*job), jobs):
                    known |= {(part[index], code): outcome for code, outcome in found.items()}
                    bar.update()
    return [
        NO_CODE if code is None else known.get((example, code), NO_ROW) for example, code in answers
    ]


def releases(examples: list[Example]) -> dict[Example, verify.Row]:
    """The `verify.Row` of each example that is a row of our own sources."""
    libraries = {example.dependency.lower() for example in examples}
    sources = (source for file in verify.RECORDS for source in verify.build.sources(file).items())
    paths = (path for library, paths in sources if library in libraries for path in paths)
    rows = {(x.id, x.old_code, x.new_code): x for path in paths for x in verify.rows(path)}
    found = {example: (example.id, example.old_code, example.new_code) for example in examples}
    return {example: rows[key] for example, key in found.items() if key in rows}


@contextlib.contextmanager
def interpreter(release: tuple[str, ...], envs: str = "") -> Iterator[tuple[str, str]]:
    """(path of a Python that has this release, "" or why there is none).

    Made by uv, unless the folder `envs` has it from another time; kept there, or else removed.
    """
    with tempfile.TemporaryDirectory(prefix="execute-") as scratch:
        folder = Path(envs or scratch).resolve() / verify.digest(*release)
        if not (folder / "complete").exists() and not shutil.which("uv"):
            raise ValueError("--run makes environments with uv: pip install uv")
        fault, name = asyncio.run(verify.install(release, folder)), ", ".join(release)
        yield str(folder / "bin" / "python"), fault and f"{name} is not installed: {fault}"


def one_row(row: verify.Row, codes: list[str], box: Box, fault: str) -> dict[str, Outcome]:
    """The outcome of each code of one row, after its true code."""
    if fault:
        return dict.fromkeys(codes, Outcome(UNKNOWN, fault))
    with passk.runner(replace(box, imports=verify.modules(row))) as verdict:

        def run(code: str) -> verify.Run:
            own = f"open('main.py', 'w', encoding='utf-8').write({code!r})\n"  # pytest reads it
            return heard(verdict(Task(code, TELL, own + verify.LISTEN + PREPARE)), box)

        truth = run(row.new_code)
        if truth.outcome != "ok":
            why = f"the true code does not run in the sandbox: {truth.detail}"
            return dict.fromkeys(codes, Outcome(UNKNOWN, why))
        return {code: one_code(row, code, truth, run) for code in codes}


def heard(verdict: Verdict, box: Box) -> verify.Run:
    """What the program printed, and the deprecations that it met."""
    # The environment's folder differs between machines, so no reason may name it.
    home = str(Path(box.python).parent.parent)
    printed, _, warned = verdict.output.rpartition(MARK)
    run = verify.Run(verdict.outcome, verdict.reason.replace(home, "ENV"))
    if verdict.outcome != "pass":
        return run
    try:
        return run._replace(outcome="ok", printed=printed, warned=json.loads(warned))
    except ValueError:
        return run._replace(outcome="fail", detail=f"it prints more than {LIMITS.output} bytes")


def one_code(row: verify.Row, code: str, truth: verify.Run, run: Callable) -> Outcome:
    """The outcome of one code, given the run of the true code and the runner of both."""
    found = run(code)
    if found.outcome != "ok":
        return Outcome(UNKNOWN if found.outcome == UNKNOWN else WRONG, found.detail)
    if telling := next(verify.warnings_of_change(row._replace(old_code=code), truth, found), ""):
        return Outcome(WRONG, f"it warns: {telling}")
    if found.printed != truth.printed:
        return Outcome(WRONG, "it prints otherwise")
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
    return Outcome(RIGHT)


def table(groups: dict[str, list], title: str = "split") -> str:
    """Markdown on graded answers that were run; shares are of the rows that could be run.

    All but `any form` count code in the asked form. Copies: old code where there was a job to do.
    """

    def cells(graded: list) -> list:
        known = [g for g in graded if g.run != UNKNOWN]
        right, exact = sum(g.run == RIGHT for g in known), sum(g.exact for g in known)
        asked = sum(g.run == RIGHT and g.asked for g in known)
        counts = asked, right, exact, sum(g.copied and not g.exact for g in known)
        shares = [f"{n} ({100 * n / max(len(known), 1):.1f} %)" for n in counts]
        return [len(graded) - len(known), *shares]

    heads = "rows | could not run | right by execution | the same, any form | exact | copies"
    return passk.markdown(f"| {title} | {heads} |", groups, cells)


def remarks(splits: dict[str, list]) -> str:
    """Which answers to read, and why some could not be run."""
    lines, reasons = [], collections.Counter()
    for name, graded in splits.items():
        ids = [g.example.id for g in graded if g.run == RIGHT and not g.exact_any]
        lines.append(f"Right, but not exact, {name}: {', '.join(ids) or 'none'}")
        reasons.update(g.reason for g in graded if g.run == UNKNOWN)
    lines += [f"Could not run: {n} x {reason}" for reason, n in reasons.most_common()]
    return "\n".join(lines)
