"""Prove the data set by running it, and keep the outcomes in `verified.jsonl`.

    pip install pyyaml tqdm uv
    python -m data.verify                      proves the rows that are new, changed or not proved
    python -m data.verify --library httpx      the same for one library
    python -m data.verify --file updates_2026  the same for one file of rows
    python -m data.verify --exact              proves one row of an update in `new_version` itself
    python -m data.verify --exact 3.9 "six<2"  the same under another Python, beside other packages

Three runs a row: (1) the new code in the new release runs, prints and gives no deprecation warning;
(2) the old code in the new release fails, warns of a deprecation or prints something else; (3) the
old code in the old release prints what the new code printed in (1). Where the note does not apply
to the code, old and new code are the same, and (2) must print what (1) printed, too.

A release has a virtual environment of its own or, if `together.yaml` says so, one with releases of
other libraries, made by uv (torch fills its cache with 20 GB; UV_TORCH_BACKEND=cpu makes it less).
Each run is a process of its own. Needs Linux or macOS.
"""

import argparse
import asyncio
import collections
import contextlib
import fcntl
import functools
import hashlib
import inspect
import json
import keyword
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import warnings
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from data import HERE, build, json_lines

RECORDS = {name: HERE / f"{name.replace('updates', 'verified')}.jsonl" for name in build.FOLDERS}
EXACT = HERE / "verified_exact.jsonl"  # of --exact
TOGETHER = HERE / "together.yaml"
LIMIT = 120  # seconds for a program; a first import on a busy machine takes long
FAULTS: dict[Path, str] = {}  # why an environment could not be made: that is tried once
MISSING = "not installed"
RUNS = {  # the three runs, and how the outcomes of a proved row begin
    "new_on_new": ("ok",),
    "old_on_new": ("fails", "warns", "differs"),
    "old_on_old": ("ok",),
}
SAME = "same as new"  # the good end of old_on_new where the note does not apply to the code
FAILED = "FAILED"
STATES = "proved three ways", "proved two ways (no old release)", "no new release", FAILED
SETTINGS = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | {
    "CUDA_VISIBLE_DEVICES": "", "LC_ALL": "C.UTF-8", "PATH": os.defpath
}  # fmt: skip
Release = tuple[str, ...]  # ("Python 3.11", "click==8.1.8", ...): what one environment holds


class Row(NamedTuple):
    id: str
    dependency: str
    old_code: str
    new_code: str
    old_release: Release
    new_release: Release
    file: str = ""  # of the rows; "" where a release that is missing is no fault


class Run(NamedTuple):
    """What came of one program in one release."""

    outcome: str  # "ok", "fails: NameError", "timeout", "killed" or "not installed"
    detail: str = ""  # the error's message, or why the release is not installed
    printed: str = ""
    warned: list = []  # of each deprecation: category, whether its line is the program's, text


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def rows(path: Path, exact: list[str] | None = None, file: str = "updates") -> Iterator[Row]:
    """The rows of one file with the releases that prove them.

    With `exact`, the first row of each update that is otherwise proved in a later release.
    """
    source = build.read(path)
    of_update = {update["id"]: update for update in source["updates"]}
    for row in build.rows(path):
        update = of_update[row["id"].rpartition("-")[0]]
        later = update.get("run_version", update["new_version"]) != update["new_version"]
        if exact is None or later and row["id"].endswith("-0"):
            fields = [row[field] for field in Row._fields[:4]]
            strict = "" if file == "updates" else file
            yield Row(*fields, *releases(source, update, exact), strict)


def releases(source: dict, update: dict, exact: list[str] | None = None) -> tuple[Release, Release]:
    """The old and the new release; what an update requires adds to what its file requires.

    With `exact` the new one is `new_version` itself. Where the list has a Python, the packages
    after it, or else what the old release requires, stand for what the new one requires.
    """
    library, old, new = source["library"], update["old_version"], update["new_version"]
    if exact is None:
        new = update.get("run_version", new)
    if library == "python":
        return (f"Python {old}",), (f"Python {new}",)
    python = update.get("python", source.get("python", "3.11"))
    requires = source.get("requires", []) + update.get("requires", [])
    old_requires = source.get("old_requires", []) + update.get("old_requires", []) or requires
    old_release = f"Python {update.get('old_python', python)}", f"{library}=={old}", *old_requires
    if exact:
        python, requires = exact[0], exact[1:] or old_requires
    return old_release, (f"Python {python}", f"{library}=={new}", *requires)


@functools.cache
def groups() -> list[Release]:
    """The releases that `together.yaml` puts into one environment, a list each."""
    return list(map(tuple, yaml.safe_load(TOGETHER.read_text(encoding="utf-8"))))


def home(release: Release) -> Release:
    """What the environment holds in which a release is tried: a group that has it, or it alone."""
    return next((group for group in groups() if set(release) <= set(group)), release)


def modules(row: Row) -> tuple[str, ...]:
    """The libraries that both programs import: a module that only one imports may itself warn."""
    old, new = (re.findall(r"(?m)^ *(?:from|import) (\w+)", code) for code in row[2:4])
    return tuple(sorted(set(old) & set(new) - sys.stdlib_module_names))


# ---------------------------------------------------------------- running programs


def listen(warned, own):
    """From now on add each deprecation to `warned`: category, whether a line of `own` warns, text.

    What counts as one is said here alone: `sandbox/rows.py` hands on this source, too.
    """
    import warnings

    def note(message, category, filename, *_):
        kinds = " ".join(kind.__name__ for kind in category.__mro__)
        if any(word in kinds for word in ("Deprecat", "FutureWarning", "RemovedIn")):
            warned.append((category.__name__, filename == own, str(message)))

    warnings.resetwarnings()
    warnings.simplefilter("always")
    warnings.showwarning = note


def perform(folder, modules, seconds):
    """Import the modules, then run the program of a folder and write its report.

    An environment is handed PERFORM: nothing else from outside, and all that Python 3.7 knows.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process
    warnings.simplefilter("ignore")
    for name in modules:
        with contextlib.suppress(Exception):  # the program meets the same error and reports it
            __import__(name)
    warned, outcome, detail, path = [], "ok", "", folder + "/program.py"
    sys.argv, sys.path[0] = [path], folder + "/empty"
    listen(warned, path)
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException as fault:
        if not isinstance(fault, SystemExit) or fault.code:
            outcome, detail = "fails: " + type(fault).__name__, str(fault)
    sys.stdout.flush()
    with open(folder + "/report", "w", encoding="utf-8") as file:
        json.dump({"outcome": outcome, "detail": detail, "warned": warned}, file)
    os._exit(0)


# Read now: an edit while this runs must not reach it.
LISTEN = inspect.getsource(listen)
PERFORM = "import contextlib, json, os, runpy, signal, sys, warnings\n"
PERFORM += LISTEN + inspect.getsource(perform)


async def run(release: Release, envs: Path, code: str, modules: tuple[str, ...] = ()) -> Run:
    """Run one program in an empty folder, after an import of these modules."""
    environment = envs / digest(*release)
    if fault := await install(release, environment):
        return Run(MISSING, f"{', '.join(release)} is not installed: {fault}")
    (environment / "home").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        folder, python = Path(name), environment / "bin" / "python"
        (folder / "empty").mkdir()
        (folder / "program.py").write_text(code, encoding="utf-8")
        source = f"{PERFORM}\nperform({name!r}, {modules}, {LIMIT})"
        env = SETTINGS | {"HOME": str(environment / "home"), "TMPDIR": name}
        with open(folder / "printed", "wb") as out:
            how = {"cwd": folder / "empty", "env": env, "stdout": out, "stderr": DEVNULL}
            status, _ = await call(python, "-c", source, **how)
        if not (folder / "report").exists():
            return Run("timeout" if status == -signal.SIGALRM else "killed")
        printed = (folder / "printed").read_text(encoding="utf-8", errors="replace")
        return Run(**json.loads((folder / "report").read_text(encoding="utf-8")), printed=printed)


async def call(*command: str | Path, **how) -> tuple[int, bytes]:
    """(exit status, complaint) of a command. All that it started ends with it, or if we stop."""
    how |= {"stdin": DEVNULL, "start_new_session": True}
    process = await asyncio.create_subprocess_exec(*command, **how)
    try:
        _, complaint = await process.communicate()
    finally:
        with contextlib.suppress(OSError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return process.returncode, complaint


async def uv(*arguments: str) -> str:
    """Call uv. Returns "", or its complaint in a few words that are the same on every machine."""
    away = tempfile.gettempdir()  # from the settings of this project
    status, complaint = await call("uv", "--quiet", *arguments, cwd=away, stderr=PIPE)
    if not status:
        return ""
    text = " ".join(complaint.decode(errors="replace").split())
    cause = re.search(r"Because (.*?)(?: and you require|, we can conclude)", text)
    cannot = re.search(r"Failed to build `([^`]+)`", text)
    return cause[1] if cause else f"cannot build {cannot[1]}" if cannot else "uv cannot install it"


async def install(release: Release, folder: Path) -> str:
    """Make an environment unless it is there. Returns "", or why it cannot be made.

    One at a time in a folder of environments, so that two can ask for the same one.
    """
    complete = folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    while not complete.exists() and folder not in FAULTS:
        with contextlib.suppress(BlockingIOError), alone(folder.parent, fcntl.LOCK_NB):
            if complete.exists():  # another process has just made it
                break
            if fault := await make(release, folder):
                FAULTS[folder] = fault
            else:
                complete.touch()
        await asyncio.sleep(0.2)  # a thread that waits for the lock would not hear Ctrl-C
    return FAULTS.get(folder, "")


async def make(release: Release, folder: Path) -> str:
    """Make an environment. Returns "", or why it cannot be made."""
    python, *packages = release
    if await uv("venv", "--clear", "--python", python.split()[1], str(folder)):
        return f"no {python}"
    return await uv("pip", "install", "--python", str(folder), *packages) if packages else ""


# ---------------------------------------------------------------- the record


def fingerprint(row: Row) -> dict[str, str]:
    """What a record is about: where it differs, the row has to be proved again."""
    kind = {"kind": build.UNCHANGED} if row.old_code == row.new_code else {}
    kind |= {"file": row.file} if row.file else {}
    return kind | {
        "id": row.id,
        "dependency": row.dependency,
        "code": digest(row.old_code, row.new_code),
        "old_release": ", ".join(row.old_release),
        "new_release": ", ".join(row.new_release),
    }


def judge(row: Row, new: Run, changed: Run, old: Run) -> dict[str, str]:
    """The record of one row: the outcomes of its three runs, and why it is not proved."""
    got = dict(zip(RUNS, (new.outcome, changed.outcome, old.outcome), strict=True))
    if new.outcome == "ok":
        own = [kind for kind, here, _ in new.warned if here]
        printed = "ok" if new.printed.strip() else "prints nothing"
        got["new_on_new"] = f"warns: {own[0]}" if own else printed
    if changed.outcome == "ok":
        telling = next(warnings_of_change(row, new, changed), "")
        printed = "differs" if changed.printed != new.printed else SAME
        got["old_on_new"] = f"warns: {telling}" if telling else printed
    if old.outcome == new.outcome == "ok" and old.printed != new.printed:
        got["old_on_old"] = "differs"
    good = RUNS | ({"old_on_new": (SAME,)} if row.old_code == row.new_code else {})
    good = good if row.file else {name: ends + (MISSING,) for name, ends in good.items()}
    bad = [f"{name}: {end}" for name, end in got.items() if not end.startswith(good[name])]
    missing = [run.detail for run in (new, old) if run.outcome == MISSING]
    return fingerprint(row) | got | {"reason": "; ".join(bad + missing)}


def warnings_of_change(row: Row, new: Run, changed: Run) -> Iterator[str]:
    """Categories of the deprecations that only the old code causes.

    The line that warns must be the program's own, or the text must name a word of a changed line.
    """
    lines = set(row.old_code.split("\n")) ^ set(row.new_code.split("\n"))
    words = set(re.findall(r"\w{3,}", " ".join(lines))) - set(keyword.kwlist)
    for kind, here, text in changed.warned:
        if [kind, here, text] not in new.warned:
            if here or words & set(re.findall(r"\w+", text)):
                yield kind


def state(record: dict[str, str]) -> str:
    """Which of STATES a record is in: the reason of one that failed begins with the bad run."""
    if record["reason"].startswith(tuple(RUNS)):
        return FAILED
    return STATES[2 if record["new_on_new"] == MISSING else record["old_on_old"] == MISSING]


def read(path: Path) -> dict[str, dict[str, str]]:
    """The records of a file by id."""
    return {record["id"]: record for _, record in json_lines(path)} if path.exists() else {}


def write(path: Path, changes: dict[str, dict[str, str] | None]) -> None:
    """Put these records into a file, and take out those that are None.

    The file is whole at any time, and what another process has put into it stays.
    """
    with alone(path.parent):
        records = sorted((read(path) | changes).items())
        draft = path.with_suffix(".draft")
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for _, record in records if record]
        draft.write_text("".join(lines), encoding="utf-8", newline="\n")
        draft.replace(path)


@contextlib.contextmanager
def alone(folder: Path, how: int = 0) -> Iterator[None]:
    """Keep others that ask for this folder, too, waiting; LOCK_NB: raise BlockingIOError there."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(lock)


def summary(records: list[dict[str, str]]) -> None:
    """Print the counts of each library and of all, then each reason with its number of rows."""
    counts, reasons = collections.defaultdict(collections.Counter), collections.Counter()
    for record in records:
        counts[record["dependency"]][state(record)] += 1
        name = record["id"] + " " if state(record) == FAILED else ""
        reasons[name + record["reason"]] += bool(record["reason"])
    counts["all"] = sum(counts.values(), collections.Counter())
    for name, count in counts.items():
        print(f"{name:14}", ", ".join(f"{count[s]} {s}" for s in STATES if count[s]))
    for reason, number in (+reasons).items():
        print(f"{number} x {reason}")


def stands(row: Row, record: dict[str, str] | None, exact: list[str] | None = None) -> bool:
    """Whether a record is about this very row and needs no other try.

    With `exact`, whatever another Python has proved of this release stands.
    """
    mine = fingerprint(row)
    if not record or state(record) == FAILED:
        return False
    if exact is None:
        return mine.items() <= record.items()
    release = record["new_release"].split(", ")[:2][-1]
    proved = record["new_on_new"] != MISSING
    return proved and record["code"] == mine["code"] and release == row.new_release[:2][-1]


# ---------------------------------------------------------------- the command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    libraries = sorted({library for file in RECORDS for library in build.sources(file)})
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--library", nargs="+", metavar="NAME", choices=libraries, default=libraries)
    add("--file", nargs="+", choices=list(RECORDS), default=list(RECORDS), help="files of rows")
    add("--envs", type=Path, metavar="FOLDER", help="keep the environments here for another time")
    add("--jobs", type=int, default=os.cpu_count(), help="rows at a time")
    add("--again", action="store_true", help="prove also what is proved")
    text = "one row of each of `updates` in new_version itself, if need be under this Python"
    add("--exact", nargs="*", metavar=("PYTHON", "PACKAGE"), help=text)
    args = parser.parse_args(argv)
    if not shutil.which("uv"):
        parser.error("uv is not on the PATH: pip install uv")
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    return args


def homes(row: Row) -> tuple[Release, Release]:
    return home(row.new_release), home(row.old_release)


async def prove(file: str, args: argparse.Namespace, envs: Path) -> list[dict[str, str]]:
    """Prove the rows of one file that were asked for, and return their records."""
    path = RECORDS[file] if args.exact is None else EXACT
    sources = [path for name in args.library for path in build.sources(file).get(name, ())]
    asked = {row.id: row for source in sources for row in rows(source, args.exact, file)}
    records = read(path)
    known = {n for n, record in records.items() if record["dependency"].lower() in args.library}
    write(path, dict.fromkeys(known - asked.keys()))
    todo = [r for r in asked.values() if args.again or not stands(r, records.get(r.id), args.exact)]
    left = collections.Counter(release for row in todo for release in homes(row))
    queue = iter(sorted(todo, key=homes))  # few environments at a time

    async def worker() -> None:
        for row in queue:
            new, old = homes(row)
            tries = (new, row.new_code), (new, row.old_code), (old, row.old_code)
            runs = [await run(release, envs, code, modules(row)) for release, code in tries]
            record = records[row.id] = judge(row, *runs)
            write(path, {row.id: record})
            bar.update()
            if state(record) == FAILED:
                bar.write("\n    ".join([f"{row.id}: {record['reason']}", *map(str, runs)]))
            left.subtract(homes(row))
            for release in homes(row):
                if not left[release] and not args.envs:
                    shutil.rmtree(envs / digest(*release), ignore_errors=True)

    with tqdm(total=len(todo), desc=file, unit="row", disable=not todo) as bar:
        await asyncio.gather(*(worker() for _ in range(args.jobs)))
    return [records[name] for name in sorted(asked)]


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
            envs = (args.envs or Path(scratch)).resolve()
            files = args.file if args.exact is None else ["updates"]
            records = [x for file in files for x in asyncio.run(prove(file, args, envs))]
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:  # of the builder, about a source file
        print(error, file=sys.stderr)
        return 2
    summary(records)
    return int(any(state(record) == FAILED for record in records))


if __name__ == "__main__":
    sys.exit(main())
