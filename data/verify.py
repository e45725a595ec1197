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
other libraries. They are made from the Python package index; uv's own settings apply (torch fills
its cache with 20 GB, or with less after UV_TORCH_BACKEND=cpu). An import takes seconds and a fork
takes milliseconds: a server in the environment imports what a program imports, and forks a child
that runs the program. So it needs fork: Linux or macOS.
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
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from data import HERE, build, json_lines

RECORDS = {  # of each file of rows
    "updates": HERE / "verified.jsonl",
    "updates_2026": HERE / "verified_2026.jsonl",
    "updates_behaviour": HERE / "verified_behaviour.jsonl",
}
EXACT = HERE / "verified_exact.jsonl"  # of --exact
TOGETHER = HERE / "together.yaml"
LIMIT = 120  # seconds for a program; a first import on a busy machine takes long
PATIENCE = 900  # seconds for an installation
MISSING = "not installed"
RUNS = {  # the three runs, and how the outcomes of a proved row begin
    "new_on_new": ("ok",),
    "old_on_new": ("fails", "warns", "differs"),
    "old_on_old": ("ok",),
}
SAME = "same as new"  # the good end of old_on_new where the note does not apply to the code
STATES = "proved three ways", "proved two ways (no old release)", "no new release", "FAILED"
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

    With `exact`, one row of each update that is otherwise proved in a later release than its own.
    """
    source = build.read(path)
    of_update = {update["id"]: update for update in source["updates"]}
    seen: set[str] = set()
    for row in build.rows(path):
        update = of_update[row["id"].rpartition("-")[0]]
        later = update.get("run_version", update["new_version"]) != update["new_version"]
        if exact is None or later and update["id"] not in seen:
            fields = [row[field] for field in Row._fields[:4]]
            strict = "" if file == "updates" else file
            yield Row(*fields, *releases(source, update, exact), strict)
        seen.add(update["id"])


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


# ---------------------------------------------------------------- running a program


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


def serve(seconds, modules):
    """Fork a child for each folder named on the input; answer with the signal that ended it.

    An environment is handed this source and that of `listen` alone: nothing else from outside, and
    all that Python 3.7 knows.
    """
    import json
    import os
    import signal
    import sys
    import types
    import warnings

    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    warnings.simplefilter("ignore")
    for name in modules:
        try:
            __import__(name)
        except Exception:
            pass  # the program meets the same error and reports it
    for line in sys.stdin:
        folder = line.rstrip("\n")
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            print(os.WTERMSIG(status), file=answers, flush=True)
            continue
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the child
        os.dup2(nothing, 0)
        os.dup2(os.open(folder + "/printed", os.O_WRONLY | os.O_CREAT), 1)
        os.chdir(folder + "/empty")
        path = folder + "/program.py"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__, sys.argv, sys.path[0] = path, [path], folder + "/empty"
        warned, error = [], None
        listen(warned, path)
        try:
            with open(path, encoding="utf-8") as file:
                code = compile(file.read(), path, "exec")
            exec(code, main.__dict__)
        except BaseException as fault:
            if not isinstance(fault, SystemExit) or fault.code:
                error = type(fault).__name__, str(fault)
        sys.stdout.flush()
        with open(folder + "/report", "w", encoding="utf-8") as file:
            json.dump({"error": error, "warned": warned}, file)
        os._exit(0)


# Read now: an edit while this runs must not reach it.
LISTEN = inspect.getsource(listen)
SERVER = LISTEN + inspect.getsource(serve)


class Environment:
    """A virtual environment and its server, a new one for each set of modules to import beforehand.

    One set a server: what another program imports could hide an import that is missing.
    """

    def __init__(self, release: Release, folder: Path, scratch: Path):
        self.release, self.folder, self.scratch = release, folder, scratch
        self.fault, self.modules, self.process = "", None, None

    async def install(self) -> None:
        """Make the environment unless it is there; `fault` says why it cannot be made.

        One at a time in a folder of environments, so that two can ask for the same one.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder.parent, os.O_RDONLY)
        try:
            while not free(lock):
                await asyncio.sleep(0.2)
            if not (self.folder / "complete").exists():
                await self.make()
        finally:
            os.close(lock)

    async def make(self) -> None:
        python, *packages = self.release
        if await uv("venv", "--clear", "--python", python.split()[1], str(self.folder)):
            self.fault = f"no {python}"
        elif packages:
            self.fault = await uv("pip", "install", "--python", str(self.folder), *packages)
        if not self.fault:
            (self.folder / "complete").touch()

    async def run(self, code: str, modules: tuple[str, ...] = ()) -> Run:
        """Run one program in an empty folder, forked from a server that has these modules."""
        if self.fault:
            return Run(MISSING, f"{', '.join(self.release)} is not installed: {self.fault}")
        server = await self.server(modules)
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            folder = Path(name)
            (folder / "empty").mkdir()
            (folder / "program.py").write_text(code, encoding="utf-8")
            server.stdin.write(f"{folder}\n".encode())
            ended = await server.stdout.readline()
            if not (folder / "report").exists():
                return Run("timeout" if ended == b"%d\n" % signal.SIGALRM else "killed")
            report = json.loads((folder / "report").read_text(encoding="utf-8"))
            printed = (folder / "printed").read_text(encoding="utf-8", errors="replace")
        error, message = report["error"] or ("", "")
        outcome = f"fails: {error}" if error else "ok"
        return Run(outcome, message, printed, report["warned"])

    async def server(self, modules: tuple[str, ...]) -> asyncio.subprocess.Process:
        if self.process and self.modules == modules:
            return self.process
        await self.close(keep=True)
        place = self.folder / "home"
        place.mkdir(exist_ok=True)
        self.modules = modules
        self.process = await asyncio.create_subprocess_exec(
            *(self.folder / "bin" / "python", "-c"),
            f"{SERVER}\nserve({LIMIT}, {modules})",
            cwd=self.scratch,
            env=SETTINGS | {"HOME": str(place), "TMPDIR": str(self.scratch)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        return self.process

    async def close(self, keep: bool) -> None:
        if self.process:
            await kill(self.process)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def free(lock: int) -> bool:
    """Take a lock, if nobody has it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


async def uv(*arguments: str) -> str:
    """Call uv. Returns "", or its complaint in a few words that are the same on every machine."""
    process = await asyncio.create_subprocess_exec(
        *("uv", "--quiet", *arguments),
        cwd=tempfile.gettempdir(),  # away from the settings of this project
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, complaint = await asyncio.wait_for(process.communicate(), PATIENCE)
    except asyncio.TimeoutError:
        return f"takes more than {PATIENCE // 60} minutes"
    finally:
        await kill(process)
    if not process.returncode:
        return ""
    text = " ".join(complaint.decode(errors="replace").split())
    cause = re.search(r"Because (.*?)(?: and you require|, we can conclude)", text)
    cannot = re.search(r"Failed to build `([^`]+)`", text)
    return cause[1] if cause else f"cannot build {cannot[1]}" if cannot else "uv cannot install it"


async def kill(process: asyncio.subprocess.Process) -> None:
    """End a process with all that it started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


Left = collections.Counter[Release]  # rows that still need an environment


async def prove(library: list[Row], envs: Path, scratch: Path, left: Left, done: Callable) -> None:
    """Run each row of one library three times and hand the runs to `done`.

    An environment goes when no row of any library needs it, so that few are on the disk at a time.
    """
    library = sorted(library, key=lambda row: (*homes(row), modules(row)))
    alive: dict[Release, Environment] = {}
    try:
        for row in library:
            for release in homes(row):
                if release not in alive:
                    alive[release] = Environment(release, envs / digest(*release), scratch)
                    await alive[release].install()
            new, old = (alive[release] for release in homes(row))
            todo = (new, row.new_code), (new, row.old_code), (old, row.old_code)
            done(row, *[await env.run(code, modules(row)) for env, code in todo])
            left.subtract(homes(row))
            for release in set(alive):
                if not left[release]:
                    await alive.pop(release).close(keep=False)
    finally:
        for environment in alive.values():
            await environment.close(keep=True)


def homes(row: Row) -> tuple[Release, Release]:
    return home(row.new_release), home(row.old_release)


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
    outcomes = {"new_on_new": new.outcome, "old_on_new": changed.outcome, "old_on_old": old.outcome}
    if new.outcome == "ok":
        own = [kind for kind, here, _ in new.warned if here]
        printed = "ok" if new.printed.strip() else "prints nothing"
        outcomes["new_on_new"] = f"warns: {own[0]}" if own else printed
    if changed.outcome == "ok":
        telling = list(warnings_of_change(row, new, changed))
        printed = "differs" if changed.printed != new.printed else SAME
        outcomes["old_on_new"] = f"warns: {telling[0]}" if telling else printed
    if old.outcome == new.outcome == "ok" and old.printed != new.printed:
        outcomes["old_on_old"] = "differs"
    record = fingerprint(row) | outcomes
    bad = [f"{name}: {outcomes[name]}" for name in RUNS if not good(record, name)]
    missing = [run.detail for run in (new, old) if run.outcome == MISSING]
    return record | {"reason": "; ".join(bad + missing)}


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


def good(record: dict[str, str], name: str) -> bool:
    """Whether one of the three runs ended as that of a proved row does."""
    if record[name] == MISSING:
        return not record.get("file")
    unchanged = name == "old_on_new" and record.get("kind") == build.UNCHANGED
    return record[name].startswith(SAME if unchanged else RUNS[name])


def state(record: dict[str, str]) -> str:
    """Which of STATES a record is in."""
    if not all(good(record, name) for name in RUNS):
        return STATES[3]
    if record["new_on_new"] == MISSING:
        return STATES[2]
    return STATES[record["old_on_old"] == MISSING]


def read(path: Path) -> dict[str, dict[str, str]]:
    """The records of a file by id."""
    try:
        lines = json_lines(path) if path.exists() else ()
        return {record["id"]: record for _, record in lines}
    except (ValueError, TypeError, KeyError):
        sys.exit(f"{path.name} has a line that is no record: delete the file and start again")


def write(path: Path, changes: dict[str, dict[str, str] | None]) -> None:
    """Put these records into a file, and take out those that are None.

    The file is whole at any time, and what another process has put into it stays.
    """
    with alone(path.parent):
        records = {name: r for name, r in (read(path) | changes).items() if r}
        draft = path.with_suffix(".draft")
        lines = [json.dumps(records[name], ensure_ascii=False) + "\n" for name in sorted(records)]
        draft.write_text("".join(lines), encoding="utf-8", newline="\n")
        draft.replace(path)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for this folder, too, waiting."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def summary(records: list[dict[str, str]]) -> None:
    """Print the counts of each library and of all, then each reason with its number of rows."""
    counts, reasons = collections.defaultdict(collections.Counter), collections.Counter()
    for record in records:
        counts[record["dependency"]][state(record)] += 1
        name = record["id"] + " " if state(record) == STATES[3] else ""
        reasons[name + record["reason"]] += bool(record["reason"])
    counts["all"] = sum(counts.values(), collections.Counter())
    for name, count in counts.items():
        print(f"{name:14}", ", ".join(f"{count[s]} {s}" for s in STATES if count[s]))
    for reason, number in (+reasons).items():
        print(f"{number} x {reason}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    libraries = sorted({library for file in RECORDS for library in build.sources(file)})
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--library", nargs="+", metavar="NAME", choices=libraries, default=libraries)
    add("--file", nargs="+", choices=list(RECORDS), default=list(RECORDS), help="files of rows")
    add("--envs", type=Path, metavar="FOLDER", help="where to make environments (temporary)")
    add("--keep", action="store_true", help="keep the environments in --envs for another time")
    add("--jobs", type=int, default=2, help="libraries at a time")
    add("--again", action="store_true", help="prove also what is proved")
    text = "prove one row of each update in new_version itself, if need be under this Python"
    add("--exact", nargs="*", metavar=("PYTHON", "PACKAGE"), help=text)
    args = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        parser.error("this needs os.fork: run it on Linux or macOS")
    if not shutil.which("uv"):
        parser.error("uv is not on the PATH: pip install uv")
    if args.keep and not args.envs:
        parser.error("--keep needs --envs FOLDER")
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    return args


def stands(row: Row, record: dict[str, str], exact: list[str] | None) -> bool:
    """Whether a record is about this very row and needs no other try.

    With `exact`, whatever another Python has proved of this release stands.
    """
    if exact is None:
        return fingerprint(row).items() <= record.items() and state(record) != STATES[3]
    proved = record and state(record) in STATES[:2]
    same = proved and record["code"] == fingerprint(row)["code"]
    return bool(same and row.new_release[:2][-1] == record["new_release"].split(", ")[:2][-1])


def wanted(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of each library that was asked for, of all files that were."""
    found: dict[str, list[Row]] = {name: [] for name in args.library}
    for file in args.file:
        sources = build.sources(file)
        for name in found:
            for path in sources.get(name, ()):
                found[name] += rows(path, args.exact, file)
    return found


async def prove_all(args: argparse.Namespace, scratch: Path) -> list[dict[str, str]]:
    """Prove the libraries asked for, the largest first, and return their records."""
    found, gate = wanted(args), asyncio.Semaphore(args.jobs)
    names = {row.id for library in found.values() for row in library}
    paths = {file: RECORDS[file] if args.exact is None else EXACT for file in args.file}
    records = {}
    for path in paths.values():
        known = read(path)
        gone = {name for name in set(known) - names if known[name]["dependency"].lower() in found}
        if gone:
            write(path, dict.fromkeys(gone))
        records |= {name: record for name, record in known.items() if name not in gone}
    todo = [
        [r for r in library if args.again or not stands(r, records.get(r.id, {}), args.exact)]
        for library in found.values()
    ]
    envs = args.envs.resolve() if args.envs else scratch / "envs"
    left = collections.Counter(x for library in todo for row in library for x in homes(row))
    left.update(left if args.keep else {})  # so that they are never none
    with tqdm(total=sum(map(len, todo)), unit="row") as bar:

        def done(row: Row, *runs: Run) -> None:
            record = records[row.id] = judge(row, *runs)
            write(paths[row.file or "updates"], {row.id: record})
            bar.update()
            if state(record) == STATES[3]:
                bar.write("\n    ".join([f"{row.id}: {record['reason']}", *map(str, runs)]))

        async def one(library: list[Row]) -> None:
            async with gate:
                await prove(library, envs, scratch, left, done)

        todo.sort(key=len, reverse=True)
        try:
            # Told to return exceptions, it waits until the last library has ended its servers.
            for fault in await asyncio.gather(*map(one, todo), return_exceptions=True):
                if fault:
                    raise fault
        finally:
            for release in () if args.keep else left:
                shutil.rmtree(envs / digest(*release), ignore_errors=True)
    return [records[name] for name in sorted(names)]


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
            records = asyncio.run(prove_all(args, Path(scratch)))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:  # of the builder, about a source file
        print(error, file=sys.stderr)
        return 2
    summary(records)
    return int(any(state(record) == STATES[3] for record in records))


if __name__ == "__main__":
    sys.exit(main())
