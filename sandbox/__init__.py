"""One untrusted program in, one verdict out: pass, fail, or could-not-run with the reason.

    run("def f(x): return x + 1", "assert f(2) == 3", calls=["f"])     -> Verdict("pass")

With bubblewrap the program runs in a child that is thrown away, under limits, in an empty folder,
without network, with nothing of the host in sight but the interpreter and its libraries. Without it
(`plain`) it is the child of an unprivileged user, and `choose` says what is then not kept out.

The verdict comes from outside the program's reach: the test runs in a judge, another process, and
calls the program's functions (`calls`) over a socket; results come as JSON. A fresh secret, which
the judge alone has read, must come back after the last assertion. See `judge.py`.

What is still possible. The program may compute an expected value rather than learn the lesson, and
may write into arrays and lists that a test passes to it, where `inout` carries those back. Without
`calls` the test runs in the program's own process: an object whose `__eq__` is always true then
passes `assert f(x) == y`, so does a patched `math.isclose`, and a program that reads its own raw
memory (ctypes) could find the secret. Verdicts without `calls` are for programs that do not cheat.
Limits hold for each process: thirty of them at their limit can fill a small machine's memory, and
what the kernel then ends is could-not-run.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sandbox import judge, wire

OUTCOMES = ("pass", "fail", "could-not-run")
# Both files reach the child as text and under the names that they have here, so that the imports in
# them hold there, too: it need not see the folder that they lie in.
SOURCES = {x.__name__: Path(x.__file__).read_text(encoding="utf-8") for x in (wire, judge)}
INSIDE = f"""import json, sys, types
for name, text in {SOURCES!r}.items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name + ".py", "exec"), vars(sys.modules[name]))
sys.modules["sandbox.judge"].main(json.loads(sys.argv[1]))
"""
UIDS = range(61184, 65184)  # Linux distributions leave these to services that come and go


@dataclass(frozen=True)
class Limits:
    """Of one test. Time of the CPU decides; wall time only ends what sleeps."""

    cpu: int = 10  # seconds, of each process
    wall: float = 60.0  # seconds, for one that sleeps; ten times as many for one that works
    memory: int = 4 << 30  # bytes of address space, of each process
    file: int = 64 << 20  # bytes of one file, and (bwrap) of all files together
    files: int = 64  # open at once, in each process
    processes: int = 32  # processes and threads, all together
    output: int = 4096  # bytes that are kept


@dataclass(frozen=True)
class Verdict:
    outcome: str  # one of OUTCOMES
    reason: str = ""
    output: str = ""  # what the program printed, cut


@dataclass(frozen=True)
class Task:
    """A program and its test. `setup` is trusted and runs before either, on both sides."""

    program: str
    test: str = ""
    setup: str = ""
    calls: tuple[str, ...] = ()  # names the test takes from the program; none: one process for both
    inout: bool = False  # carry back what the program writes into arguments


@dataclass(frozen=True)
class Box:
    """Where programs run: an interpreter, a kind of sandbox, limits, libraries to import first."""

    python: str = sys.executable
    kind: str = ""  # "bwrap", "plain", or "" for the better one at hand
    limits: Limits = field(default_factory=Limits)
    imports: tuple[str, ...] = ()  # imported once, before the fork for each test


class Unavailable(Exception):
    """No verdict can be had; the message says why."""


def run(program: str, test: str = "", *, calls=(), setup: str = "", **box) -> Verdict:
    """The verdict on one program. Further keywords are those of `Box` (python, kind, limits)."""
    (verdict,) = run_all([Task(program, test, setup, tuple(calls))], Box(**box))
    return verdict


def run_all(tasks: Iterable[Task], box: Box | None = None) -> Iterator[Verdict]:
    """Verdicts on tests of ONE program, in one sandbox, each in processes of its own.

    A task is taken when the verdict on the one before is out, so that a generator may stop early.
    """
    sandbox = None
    try:
        for task in tasks:
            try:
                sandbox = sandbox or Sandbox(box or Box())
                verdict = sandbox.verdict(task)
            except Unavailable as error:
                verdict = Verdict("could-not-run", str(error))
            if sandbox and sandbox.lost:  # the program has hurt its keeper; the next gets a new one
                sandbox.close()
                sandbox = None
            yield verdict
    finally:
        if sandbox:
            sandbox.close()


def at_once(work: Callable, jobs: Sequence, workers: int = 0) -> Iterator[tuple[int, object]]:
    """(index, work(job)) of every job as they finish, `workers` (all cores) at the same time."""
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        futures = {pool.submit(work, job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for what is at work alone


class Sandbox:
    """A keeper (`judge.py`) in a sandbox of its own; `close` ends everything inside.

    Raises Unavailable if it cannot be had.
    """

    def __init__(self, box: Box):
        self.limits, self.lost = box.limits, False
        kind = box.kind or choose()[0]
        with contextlib.ExitStack() as stack:
            folder = tempfile.mkdtemp(prefix="sandbox-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if uid := stack.enter_context(_user()):
                os.chown(folder, uid, uid)
            elif kind == "plain":  # the program will be the same user as we are: hide from it
                judge.LIBC.prctl(judge.PR_SET_DUMPABLE, 0)
            self._start(_command(box, kind, uid), folder, stack)
            self.close = stack.pop_all().close

    def _start(self, command: list[str], folder: str, stack: contextlib.ExitStack) -> None:
        self.link, theirs = map(stack.enter_context, multiprocessing.Pipe())
        pipes = {"stdin": theirs, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        where = {"cwd": folder, "env": _environment(folder), "start_new_session": True}
        try:
            process = stack.enter_context(subprocess.Popen(command, **pipes, **where))
            stack.callback(process.kill)
            theirs.close()
            self._hear(120)
        except EOFError:
            words = process.stderr.read(4000).decode(errors="replace").strip().splitlines()
            raise Unavailable(f"the sandbox did not start: {(words or ['no word'])[-1]}") from None
        except OSError as error:
            raise Unavailable(f"{command[0]} does not start: {error}") from None

    def _hear(self, seconds: float) -> dict:
        """What the keeper says next. Raises Unavailable if the machine is at fault."""
        if not self.link.poll(seconds):
            raise TimeoutError("it says nothing")
        said = json.loads(self.link.recv_bytes())
        if said["fault"]:
            raise Unavailable(said["fault"])
        return said

    def verdict(self, task: Task) -> Verdict:
        """Send the program, then test and secret, which the judge alone reads; hear the verdict."""
        secret, kills, job = secrets.token_hex(16), _oom_kills(), asdict(task)
        test, self.lost = job.pop("test"), True  # lost, unless a report shows that all is well
        try:
            self.link.send(job)
            self.link.send({"test": test, "secret": secret})
            end = self._hear(10 * self.limits.wall + 60)
        except (EOFError, OSError, ValueError):
            end = {"report": "", "why": "it ended its keeper", "output": ""}
        outcome, reason = _said(end["report"], secret)
        self.lost = not outcome
        reason = end["why"] or reason or "the program ended before the test did"
        if outcome != "pass" and _oom_kills() != kills:
            outcome, reason = "could-not-run", "the machine ran out of memory"
        return Verdict(outcome or "fail", "" if outcome == "pass" else reason, end["output"])


def _said(report: str, secret: str) -> tuple[str, str]:
    """Outcome and reason: without the secret, no judge has said it, unless it is a fail."""
    outcome, _, reason = report.partition("\n")
    known = {f"{x} {secret}": x for x in OUTCOMES} | {"fail": "fail"}
    return known.get(outcome, ""), reason


# ---- how a keeper is started --------------------------------------------------------------------


@functools.cache
def choose(wanted: str = "") -> tuple[str, str]:
    """The kind of sandbox (`wanted`, or the better one at hand), and one line to show a person.

    Raises ValueError if it cannot be had.
    """
    if wanted not in ("", "bwrap", "plain"):
        raise ValueError(f"--sandbox must be bwrap or plain, got {wanted!r}")
    if sys.platform != "linux":
        raise ValueError("programs are run on Linux alone: its limits are what keeps them in")
    why = "" if wanted == "plain" else _bwrap_fault()
    if wanted == "bwrap" and why:
        raise ValueError(f"--sandbox bwrap cannot be had: {why}; install bubblewrap or use plain")
    if wanted != "plain" and not why:
        return "bwrap", "Programs run in bubblewrap: no network, no file of yours."
    user = "an unprivileged user" if os.getuid() == 0 else "YOU"
    return "plain", (
        f"Programs run as {user}, with limits but without bubblewrap{f' ({why})' if why else ''}: "
        "the network, the total size of their files and all that this user can read are not kept "
        "out" + ("." if os.getuid() == 0 else ", nor what you can write and end.")
    )


def _bwrap_fault() -> str:
    """Why bubblewrap cannot be used here; "" if it can."""
    if not shutil.which("bwrap"):
        return "bwrap is not installed"
    try:
        Sandbox(Box(kind="bwrap")).close()
        return ""
    except Unavailable as error:
        return str(error)


def _command(box: Box, kind: str, uid: int) -> list[str]:
    """The keeper's command line. Root starts it with what it needs to step down to user `uid`."""
    python = shutil.which(box.python)
    if python is None:
        raise Unavailable(f"there is no interpreter {box.python}")
    python, folders = os.path.abspath(python), _folders(python)
    keeper = [python, "-s", "-c", INSIDE]
    options = {"limits": asdict(box.limits), "imports": box.imports, "folders": folders}
    options |= {"uid": uid, "command": [], "alone": bool(uid) or kind == "bwrap"}
    if kind == "plain":
        return [*keeper, json.dumps(options)]
    inner = [*_bwrap(python, folders, box.limits), *keeper, json.dumps(options | {"uid": 0})]
    return [*keeper, json.dumps(options | {"command": inner})] if uid else inner


def _bwrap(python: str, folders: list[str], limits: Limits) -> list[str]:
    """bubblewrap with namespaces of its own and an empty root, into which little is bound."""
    system = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib"]
    system += ["/etc/ld.so.cache", "/usr/share/zoneinfo"]
    command = [shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns"]
    command += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    for path in filter(os.path.exists, system):
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    size = ["--size", str(limits.file)]
    command += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm"]
    command += ["--remount-ro", "/dev", *size, "--tmpfs", "/tmp"]
    for path in [*folders, *_links(python)]:  # after /tmp, which may be where they lie
        command += ["--ro-bind", path, path]
    command += ["--remount-ro", "/", "--clearenv", "--chdir", "/tmp"]
    for name, value in _environment("/tmp").items():
        command += ["--setenv", name, value]
    return command


def _environment(home: str) -> dict[str, str]:
    """All that a program finds in its environment: constants, so that runs repeat."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    fixed = {"PYTHONHASHSEED": "0", "TZ": "UTC", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    return {"HOME": home, "TMPDIR": home, **fixed, **threads}


@functools.cache
def _folders(python: str) -> list[str]:
    """Where `python` and its libraries lie. Raises Unavailable if it does not run."""
    ask = "import json, sys; print(json.dumps([sys.version_info[:2], sys.prefix, sys.base_prefix]"
    ask += " + sys.path))"
    try:
        done = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, timeout=60)
        version, *paths = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise Unavailable(f"{python} is no Python 3 that runs") from None
    if version < [3, 10]:
        raise Unavailable(f"{python} is Python {version[0]}.{version[1]}: give one from 3.10 on")
    found = set(map(os.path.normpath, paths))
    kept = sorted(path for path in found - {"/", "/usr", "/usr/local"} if os.path.isdir(path))
    return [path for path in kept if not any(path.startswith(f"{other}/") for other in kept)]


def _links(python: str) -> list[str]:
    """`python` and the files it links to, as far as no folder of `_folders` has them."""
    chain = [python]
    while os.path.islink(chain[-1]):
        chain.append(os.path.join(os.path.dirname(chain[-1]), os.readlink(chain[-1])))
    folders = _folders(python)
    chain = [os.path.normpath(path) for path in chain]
    return [path for path in chain if not any(path.startswith(f"{x}/") for x in folders)]


@contextlib.contextmanager
def _user() -> Iterator[int]:
    """A user id that no other sandbox of this machine has; all its processes are ended at last.

    0 where we are not root, who alone can become another.
    """
    if os.getuid():
        yield 0
        return
    with socket.socket(socket.AF_UNIX) as claim:
        for uid in secrets.SystemRandom().sample(UIDS, len(UIDS)):
            with contextlib.suppress(OSError):
                claim.bind(f"\0sandbox-user-{uid}")  # a name without a file: the kernel frees it
                break
        else:
            raise Unavailable("every user id for sandboxes is taken")
        try:
            yield uid
        finally:  # a program that ended its keeper has nobody else to end it
            for _ in range(100):
                mine = (x for x in judge.processes() if int(x["Uid:"]) == uid)
                alive = [int(x["Pid:"]) for x in mine if x["State:"] != "Z"]
                if not alive:
                    break
                for pid in alive:
                    judge.kill(pid)


def _oom_kills() -> int:
    """How often the kernel has ended a process for want of memory, since it started."""
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
