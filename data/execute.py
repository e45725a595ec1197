"""Answers judged by execution: run in the release that their row is about, beside the true code.

    outcomes([(example, code), ...])   -> [Outcome("right"), Outcome("wrong", "NameError"), ...]

An answer is right if it ends without an error, prints exactly what the true code prints, and warns
of no deprecation that the true code does not warn of (`verify.warnings_of_change`: on a line of its
own, or about a word of a line that differs from the true code). So an answer in another spelling
than the target is right, and the old code is wrong, as `data/verify.py` has proved.

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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import sandbox
from data import Example
from sandbox import Box, Limits, Task, Verdict

RIGHT, WRONG, UNKNOWN = "right", "wrong", "could-not-run"
# Whole outputs are compared, so that nothing may be cut; libraries map much more than they use.
LIMITS = Limits(cpu=60, memory=16 << 30, files=256, processes=256, output=1 << 20)
MARK = "\x1e"  # between what the program printed and its deprecations


class Outcome(NamedTuple):
    run: str  # RIGHT, WRONG or UNKNOWN
    reason: str = ""


def listen(space: dict) -> list:
    """Runs in the sandbox before a program: collects deprecations, by the rule of `verify.serve`.

    Its source is all that the sandbox is handed.
    """
    import os
    import sys
    import warnings

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # logs have times in them: stdout alone counts
    sys.modules["__main__"] = sys.modules["program"]
    space["__name__"] = "__main__"
    warned = []

    def note(message, category, filename, *_):
        kinds = " ".join(kind.__name__ for kind in category.__mro__)
        if any(word in kinds for word in ("Deprecat", "FutureWarning", "RemovedIn")):
            warned.append((category.__name__, filename == "<program>", str(message)))

    warnings.resetwarnings()
    warnings.simplefilter("always")
    warnings.showwarning = note
    return warned


LISTEN = inspect.getsource(listen) + "\n_deprecations = listen(globals())\ndel listen\n"
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
    judged: dict[tuple[Example, str], Outcome] = {}
    with tqdm(total=len(codes), desc="answers, run", unit="row", dynamic_ncols=True) as bar:
        for release in sorted({rows[example].new_release for example in codes}):
            part = [example for example in codes if rows[example].new_release == release]
            bar.set_postfix_str(release[-1] if len(release) < 2 else release[1])
            with interpreter(release, envs) as (python, fault):
                box = Box(python, kind, LIMITS)
                work = functools.partial(one_row, rows=rows, codes=codes, box=box, fault=fault)
                for index, found in sandbox.at_once(work, part):
                    for code, (run, reason) in found.items():
                        reason = reason.replace(str(Path(python).parent.parent), "ENV")
                        judged[part[index], code] = Outcome(run, reason)
                    bar.update()
    unknown = Outcome(
        UNKNOWN, "its release is not known: it is no row of data/updates or data/hard"
    )
    return [
        unknown if e not in rows else judged[e, code] if code is not None else NOTHING
        for e, code in answers
    ]


NOTHING = Outcome(WRONG, "the answer holds no code")


def releases(examples: Iterable[Example]) -> dict:
    """The `verify.Row` of each example that is a row of our own sources."""
    verify = _verify()
    sources, found = verify.build.sources(), {}
    by_id = {example.id: example for example in examples}
    for library in sorted({example.dependency.lower() for example in by_id.values()}):
        for row in (row for path in sources.get(library, ()) for row in verify.rows(path)):
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
        environment = verify.Environment(release, folder, Path(scratch))
        if not (folder / "complete").exists() and not shutil.which("uv"):
            raise ValueError("--run makes environments with uv: pip install uv")
        asyncio.run(environment.install())
        fault = environment.fault
        name = ", ".join(release)
        yield str(folder / "bin" / "python"), fault and f"{name} is not installed: {fault}"


def one_row(example: Example, rows: dict, codes: dict, box: Box, fault: str) -> dict[str, Outcome]:
    """The outcome of each code of one row: the true code runs first, then they do."""
    verify, row = _verify(), rows[example]
    if fault:
        return dict.fromkeys(codes[example], Outcome(UNKNOWN, fault))
    box = Box(box.python, box.kind, box.limits, verify.modules(row))
    runs = sandbox.run_all([Task(x, TELL, LISTEN) for x in (row.new_code, *codes[example])], box)
    truth = next(runs)
    if truth.outcome != "pass":
        runs.close()
        why = f"the true code does not run in the sandbox: {truth.reason}"
        return dict.fromkeys(codes[example], Outcome(UNKNOWN, why))
    return {
        code: compare(row._replace(old_code=code), truth, verdict)
        for code, verdict in zip(codes[example], runs, strict=True)
    }


def compare(row, truth: Verdict, verdict: Verdict) -> Outcome:
    """An answer, which stands as `row.old_code`, against the true code."""
    if verdict.outcome == "could-not-run":
        return Outcome(UNKNOWN, verdict.reason)
    if verdict.outcome == "fail":
        return Outcome(WRONG, verdict.reason)
    wanted, run = heard(truth), heard(verdict)
    if telling := next(_verify().warnings_of_change(row, wanted, run), ""):
        return Outcome(WRONG, f"it warns: {telling}")
    return (
        Outcome(RIGHT) if run.printed == wanted.printed else Outcome(WRONG, "it prints otherwise")
    )


def heard(verdict: Verdict):
    """What a program printed and the deprecations that it met, as a `verify.Run`."""
    printed, _, warned = verdict.output.rpartition(MARK)
    return _verify().Run("ok", printed=printed, warned=json.loads(warned))


def table(splits: dict[str, list]) -> str:
    """Markdown on graded answers that have `run` and `reason`, by split.

    Shares are of the rows that could be run; an exact answer is right without a run.
    """
    lines = [
        "| split | rows | could not run | exact | right by execution | right, but not exact |",
        "|---" * 6 + "|",
    ]
    rescued, reasons = {}, collections.Counter()
    for name, graded in splits.items():
        known = [g for g in graded if g.run != UNKNOWN]
        right = [g for g in known if g.run == RIGHT]
        rescued[name] = [g.example.id for g in right if not g.exact]
        reasons.update(g.reason for g in graded if g.run == UNKNOWN)
        shares = (f"{n} ({100 * n / max(len(known), 1):.1f} %)" for n in (
            len(right) - len(rescued[name]), len(right), len(rescued[name])))  # fmt: skip
        lines.append(
            f"| {name} | {len(graded)} | {len(graded) - len(known)} | {' | '.join(shares)} |"
        )
    lines.append("")
    for name, ids in rescued.items():
        more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
        lines.append(f"Right, but not exact, {name}: {', '.join(ids[:10]) or 'none'}{more}")
    lines += [f"Could not run: {n} x {reason}" for reason, n in reasons.most_common()]
    return "\n".join(lines)
