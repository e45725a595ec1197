"""Inside the sandbox: a judge that holds the test, and a candidate that never sees it.

`__init__.py` sends this file to the interpreter of the box; the standard library alone is needed.
There are three kinds of process:

    keeper      imports the libraries once, forks the other two for each test, ends and reaps all
    candidate   runs the untrusted program, then answers calls of its functions over a socket
    judge       runs the test; `f(x)` in it is a call over that socket (`wire.py`)

The judge alone reads the expected values and the secret, after the candidate was forked, and says
the secret after the last assertion. Keeper and judge are not dumpable: the kernel keeps their
memory and files from the candidate, which is the same user.
"""

import contextlib
import ctypes
import importlib
import json
import operator
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from sandbox.wire import Wire

# ---- candidate and judge ------------------------------------------------------------------------


def limit(limits: dict) -> None:
    """Limits of this process and of all that it starts; they can only be lowered from here on."""
    # The kernel counts threads by user; in a sandbox of its own there are but ours.
    threads = sum(int(x["Threads:"]) for x in processes() if int(x["Uid:"]) == os.getuid())
    hard = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_NPROC: threads + limits["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for what, most in hard.items():
        resource.setrlimit(what, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))  # SIGXCPU, SIGKILL


def processes() -> Iterator[dict[str, str]]:
    """/proc/PID/status of every process in sight: names, and the first word after each."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            # A program may give itself any name, and its bytes need not be UTF-8.
            with open(f"/proc/{pid}/status", errors="replace") as file:
                yield dict(words[:2] for words in map(str.split, file) if len(words) > 1)


def new_module() -> dict:
    """The namespace of a program: a real module, so that dataclasses and the like work."""
    module = sys.modules["program"] = types.ModuleType("program")
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    return vars(module)


def run(source: str, name: str, space: dict) -> None:
    exec(compile(source, name, "exec", dont_inherit=True), space)


def candidate(fd: int, job: dict) -> None:
    """Serve the judge until it hangs up: run the program, call its functions."""
    close_stdin()
    space = new_module()

    def load():
        run(job["setup"], "<setup>", space)
        run(job["program"], "<program>", space)
        for name in set(job["calls"]) - set(space):
            raise NameError(f"the program defines no {name}")
        return [space[name] for name in job["calls"]]

    wire = Wire(fd, trusting=True, inout=job["inout"])
    wire.serves |= {"load": load, "get": getattr, "len": len, "item": operator.getitem}
    while True:
        reply = wire.serve(wire.receive())
        sys.stdout.flush()
        wire.send(reply)


def judge(host: Connection, fd: int, report: int, job: dict) -> None:
    """Read test and secret, run the test against the candidate, say how it went."""
    request = host.recv()
    wire = Wire(fd, trusting=False, inout=job["inout"])
    outcome, reason = "could-not-run", ""
    try:
        space = new_module()
        run(job["setup"], "<setup>", space)
        outcome = "fail"
        space.update(zip(job["calls"], wire.ask("load"), strict=True))
        run(request["test"], "<test>", space)
        outcome = "fail" if wire.gone else "pass"
    except BaseException as error:
        if isinstance(error, ImportError) and not hasattr(error, "of_program"):
            outcome = "could-not-run"
        reason = "" if wire.gone else explain(error, request["test"])
    say(report, f"{outcome} {request['secret']}", reason)


def together(host: Connection, report: int, job: dict) -> None:
    """Program and test in one process, for tests whose values cannot cross.

    The secret waits in the memory that `list.sort` hides while it calls its key: no frame, global,
    file or object that the garbage collector knows leads there.
    """
    hidden, test = _take_request(host)
    space = new_module()

    def work(item):  # for the empty string, while the secret behind it waits
        if not item:
            run(job["setup"], "<setup>", space)
            run(job["program"], "<program>", space)
            run(test, "<test>", space)

    try:
        hidden.sort(key=lambda item: work(item) or 0)
        end = f"pass {hidden[1]}", ""
    except BaseException as error:
        end = "fail", explain(error, test)
    try:
        sys.stdout.flush()
    finally:
        say(report, *end)


def _take_request(host):
    request = host.recv()
    close_stdin()
    return ["", request["secret"]], request["test"]


def say(report: int, outcome: str, reason: str) -> None:
    os.write(report, f"{outcome}\n{reason}".encode(errors="replace"))


def close_stdin() -> None:
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)


def explain(error: BaseException, test: str) -> str:
    """`error` in one line, with the line of the test where it came up."""
    where = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<test>":
            where = "".join(test.splitlines()[number - 1 : number]).strip()
    text = ": ".join(filter(None, (type(error).__name__, str(error))))
    return text[:300] + (f" at `{where[:200]}`" if where else "")


# ---- the keeper ---------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18


def step_down(uid: int, folders: list[str]) -> None:
    """From root to user `uid`, who keeps sight of `folders` where only root may look.

    A private folder on the way is covered by an empty one that holds just what is needed, in a
    mount namespace of our own. Raises OSError where the machine does not allow that.
    """
    covers = {}
    for folder in folders:
        places = [i for i, letter in enumerate(folder) if letter == "/" and i]  # ends of parents
        private = [i for i in places if not os.stat(folder[:i]).st_mode & stat.S_IXOTH]
        if private:  # the uppermost is the first
            covers.setdefault(folder[: private[0]], []).append(folder)
    if covers:
        _system("unshare", CLONE_NEWNS)
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
    for cover, inside in covers.items():
        places = [(os.open(folder, os.O_PATH), folder) for folder in inside]
        _mount("tmpfs", cover, "tmpfs", 0, b"mode=755")
        for fd, folder in places:
            os.makedirs(folder, exist_ok=True)
            _mount(f"/proc/self/fd/{fd}", folder, None, MS_BIND | MS_REC)
            os.close(fd)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def _mount(source, target, kind, flags, data=None):
    names = (x and x.encode() for x in (source, target, kind))
    _system("mount", *names, ctypes.c_ulong(flags), data)


def _system(name, *args):
    if getattr(LIBC, name)(*args):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def keep(host: Connection, fault: str, limits: dict, alone: bool) -> None:
    """Say what is at fault, then judge one job after the other. EOFError when the host hangs up."""
    end = {"fault": fault}
    while True:
        host.send_bytes(json.dumps(end).encode())  # no pickle from where programs run
        job = host.recv()
        try:
            end = one_job(host, job, limits, alone)
        except OSError as error:  # no process, no memory: the machine's fault
            sweep(alone)
            end = {"fault": f"the machine could not start the test: {error}"}


def one_job(host: Connection, job: dict, limits: dict, alone: bool) -> dict[str, str]:
    """Fork a candidate, then a judge, wait for the verdict, end whatever is left of both."""
    ours, theirs = (end.detach() for end in socket.socketpair())
    report, say = os.pipe()
    output, null = os.memfd_create("output"), os.open(os.devnull, os.O_RDWR)
    folder = tempfile.mkdtemp()
    if job["calls"]:
        first = fork(lambda fd: candidate(fd, job), [theirs], output, folder, limits)
        last = fork(lambda *fds: judge(host, *fds, job), [ours, say], null, folder, limits)
    else:
        first = last = fork(lambda fd: together(host, fd, job), [say], output, folder, limits)
    for fd in (ours, theirs, say, null):
        os.close(fd)
    end = {"fault": "", "why": watch(first, last, limits)}
    sweep(alone)
    shutil.rmtree(folder, ignore_errors=True)
    os.lseek(output, 0, os.SEEK_SET)
    for name, fd, most in (("report", report, 1 << 16), ("output", output, limits["output"])):
        end[name] = os.read(fd, most).decode(errors="replace")
        os.close(fd)
    return end


def fork(work: Callable, fds: list[int], output: int, folder: str, limits: dict) -> int:
    """Run `work` in a child that has `fds` and stdin, prints into `output`, and is limited.

    `fds`, in ascending order, become 3, 4 and so on, and are handed to `work`.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for place, fd in enumerate((output, output, *fds), 1):
            os.dup2(fd, place)
        os.closerange(3 + len(fds), 256)
        os.chdir(folder)
        os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ.pop("PWD", None)  # bubblewrap sets it
        sys.argv = ["program"]
        limit(limits)
        work(*range(3, 3 + len(fds)))
    finally:
        os._exit(0)


def watch(first: int, last: int, limits: dict) -> str:
    """Wait for the end of `last`; says what ended it or `first` early, "" if nothing did.

    Wall time counts where a process sleeps: on a busy machine one that works may take ten times it.
    """
    for _ in range(10):
        before = _worked(first) + _worked(last)
        if _ended(last, limits["wall"]):
            return _cause({first, last}, limits)
        if _worked(first) + _worked(last) - before < limits["wall"] / 100:
            break
    return f"more than {limits['wall']:g} s of wall time"


def _worked(pid: int) -> float:
    """Seconds of CPU time that a child has used so far; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return time.clock_gettime(~pid << 3 | 2)  # see `man clock_getcpuclockid`
    return 0.0


def _cause(pids: set[int], limits: dict) -> str:
    """Which limit or signal ended one of these children."""
    for pid in pids:
        _ended(pid, 0.2)  # a candidate goes when its judge hangs up, unless it does not want to
        done, status, usage = os.wait4(pid, os.WNOHANG)
        slow = usage.ru_utime + usage.ru_stime >= limits["cpu"]
        if done and (slow or os.WTERMSIG(status) == signal.SIGXCPU):
            return f"more than {limits['cpu']} s of CPU time"
        if done and os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return ""


def _ended(pid: int, seconds: float) -> bool:
    fd = os.pidfd_open(pid)
    ready = select.select([fd], [], [], seconds)[0]
    os.close(fd)
    return bool(ready)


def sweep(alone: bool) -> None:
    """End and reap all that was started here; `alone`: one signal reaches all there is.

    What has lost its parent becomes the keeper's child, so that the loop finds it too.
    """
    while True:
        children = (int(x["Pid:"]) for x in processes() if int(x["PPid:"]) == os.getpid())
        for pid in [-1] if alone else children:
            kill(pid)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def kill(pid: int) -> None:
    """End a process, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main(options: dict) -> None:
    """Become the keeper; root first steps down, and may have a command to run instead."""
    if options["uid"]:
        step_down(options["uid"], options["folders"])
    if options["command"]:
        os.execv(options["command"][0], options["command"])
    LIBC.prctl(PR_SET_DUMPABLE, 0)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path[:] = filter(None, sys.path)
    host, fault = Connection(0), ""
    try:
        for name in options["imports"]:
            importlib.import_module(name)
    except Exception as error:
        fault = f"{sys.executable} cannot import {name} ({type(error).__name__}: {error})"
    with contextlib.suppress(EOFError):
        keep(host, fault, options["limits"], options["alone"])
