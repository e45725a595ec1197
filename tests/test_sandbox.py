"""The sandbox against cheats and hostile programs, each first seen to do its harm unprotected."""

import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import sandbox
from sandbox import Box, Limits, Task, Verdict, at_once, judge, run, run_all

CPU, WALL, FILE, FILES, PROCESSES = 2, 6, 8 << 20, 40, 10  # small limits, so that tests are quick
MEMORY = (3 << 30) + (os.getpid() << 12)  # bytes; odd enough to find our keepers in /proc by it
LIMITS = Limits(CPU, WALL, MEMORY, FILE, FILES, PROCESSES)


def _bwrap_fault() -> str:
    try:
        return "" if sandbox.choose("bwrap") else "?"
    except ValueError as error:
        return str(error)


FAULT = _bwrap_fault()
KINDS = [pytest.param("bwrap", marks=pytest.mark.skipif(bool(FAULT), reason=FAULT)), "plain"]

# ---- the thirty-odd programs --------------------------------------------------------------------

TEST = "assert f(2) == 4"  # no program below computes this honestly
REPORT = "import json, re, os, sys, time\ndef f(x): return 5\n"


PASSES, LASTS, SURVIVES = "status 0", "had to be ended", "left behind"
BOTH = ("bwrap", "plain")
READS = () if os.getuid() == 0 else ("plain",)  # without root there is no other user to be


@dataclass(frozen=True)
class Cheat:
    """`code` does harm: run unprotected, the evidence (see `_unprotected`) has the pattern `harm`.

    `unseen`: the kinds of sandbox in which the program may see its harm done, since it is done to
    itself alone, or since `choose` tells people that this kind does not keep it out.
    """

    code: str
    harm: str
    test: str = TEST
    unseen: tuple[str, ...] = ()


# A judge as many are: program and test in its own process, `expected` in its frame, a guard that
# takes functions away, and the exit status as the verdict.
NAIVE = """
import builtins, os, sys
program, test, expected = open(sys.argv[1]).read(), open(sys.argv[2]).read(), 4
if "reload" in program: os._exit = None
if "io.open" in program: builtins.open = None
result = []
def check():
    space = {}
    try:
        exec(program, space)
        exec(test, space)
        result.append("passed")
    except Exception as error:
        result.append("failed")
check()
sys.stdout.flush()
sys.exit(0 if "passed" in result else 1)
"""

CHEATS = {
    "endless loop": Cheat("def f(x):\n    while True: pass", harm=LASTS),
    "sleep": Cheat("import time\ndef f(x): time.sleep(60)", harm=LASTS),
    "fork bomb": Cheat(
        REPORT
        + "n = 0\ntry:\n    for n in range(1, 31):\n        if not os.fork():\n"
        + "            time.sleep(8); os._exit(0)\n"
        + "except OSError: n -= 1\nprint('forked', n)",
        harm="forked 30",
    ),
    "thread that outlives": Cheat(
        REPORT + "import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        harm=LASTS,
    ),
    "daemon that outlives": Cheat(
        REPORT + "if not os.fork():\n    if not os.fork(): time.sleep(8)\n    os._exit(0)\n",
        harm=SURVIVES,
    ),
    "setsid child": Cheat(
        REPORT + "if not os.fork():\n    os.setsid(); time.sleep(8); os._exit(0)",
        harm=SURVIVES,
    ),
    "ten gigabytes": Cheat(
        REPORT + "import mmap\nflags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000\n"
        "x = mmap.mmap(-1, 10 << 30, flags)\nprint('got', len(x))",
        harm="got 1",
    ),
    "endless printing": Cheat(
        REPORT + "for _ in range(40): print('x' * 100000)", harm="(x{100000}\n){40}"
    ),
    "one large file": Cheat(
        REPORT
        + "with open('large', 'wb') as file:\n    for _ in range(20): file.write(bytes(1<<20))"
        "\nprint('wrote all')",
        harm="wrote all",
    ),
    "a full disk": Cheat(
        REPORT + "for i in range(20): open(f'large{i}', 'wb').write(bytes(1 << 20))\n"
        "print('wrote all')",
        harm="wrote all",
        unseen=("plain",),
    ),
    "many open files": Cheat(
        REPORT + "files = [open(os.devnull) for _ in range(100)]\nprint('opened', len(files))",
        harm="opened 100",
    ),
    "kill of the parent": Cheat(
        REPORT + "os.kill(os.getppid(), 9)\nprint('killed')", harm="status -9"
    ),
    "the parent's environment": Cheat(
        REPORT + "print(open(f'/proc/{os.getppid()}/environ').read())", harm="TOKEN=in-the-env"
    ),
    "the parent's memory": Cheat(
        REPORT + "pid = os.getppid()\nfor line in open(f'/proc/{pid}/maps'):\n"
        "    span, mode = line.split()[:2]\n    low, high = (int(x, 16) for x in span.split('-'))\n"
        "    if mode.startswith('rw') and high - low < 1 << 27:\n"
        "        with open(f'/proc/{pid}/mem', 'rb') as file:\n            file.seek(low)\n"
        "            for hit in re.findall(rb'TOKEN=in-the-[a-z]+', file.read(high - low)):\n"
        "                print(hit.decode())",
        harm="TOKEN=in-the-env",
    ),
    "a file of the home folder": Cheat(
        REPORT + "print(open('@HOME@/diary').read())", "my secrets", unseen=READS
    ),
    "loopback": Cheat(
        REPORT
        + "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 2)\nprint('connected')",
        harm="connected",
        unseen=("plain",),
    ),
    "network outside": Cheat(
        REPORT + "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.connect(('192.0.2.1', 9))\nprint('a way out from', s.getsockname()[0])",
        harm="a way out from",
        unseen=("plain",),
    ),
    "os._exit at import": Cheat("import os\nos._exit(0)", harm=PASSES),
    "os._exit when called": Cheat(
        "import os\ndef f(x): os._exit(0)",
        harm=PASSES,
        test=f"try:\n    {TEST}\nexcept Exception: 0",
    ),
    "sys.exit at import": Cheat("import sys\nsys.exit(0)", harm=PASSES),
    "exit in atexit": Cheat(
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5", harm=PASSES
    ),
    "always equal": Cheat(
        "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()", harm=PASSES
    ),
    "always equal number": Cheat(
        "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(5)",
        harm=PASSES,
    ),
    "patched builtins": Cheat(
        "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 5",
        harm=PASSES,
        test="assert abs(f(2) - 4) < 1",
    ),
    "patched unittest": Cheat(
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 5",
        harm=PASSES,
        test="import unittest\nunittest.TestCase().assertEqual(f(2), 4)",
    ),
    "patched pytest": Cheat(
        "import pytest\npytest.approx = lambda x: 5\ndef f(x): return 5",
        harm=PASSES,
        test="import pytest\nassert f(2) == pytest.approx(4)",
    ),
    "walk through the frames to the result": Cheat(
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    if 'result' in frame.f_globals: frame.f_globals['result'].append('passed')\n"
        "    frame = frame.f_back\ndef f(x): return 5",
        harm=PASSES,
    ),
    "expected value in a caller's frame": Cheat(
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if 'expected' in frame.f_globals: return frame.f_globals['expected']\n"
        "        frame = frame.f_back",
        harm=PASSES,
    ),
    "importlib.reload(os)": Cheat(
        "import importlib, os\nimportlib.reload(os)\nos._exit(0)", harm=PASSES
    ),
    "io.open past a guard": Cheat(
        REPORT + "import io\nprint(io.open('@HOME@/diary').read())",
        harm="my secrets",
        unseen=READS,
    ),
    "deleting the working folder": Cheat(
        REPORT + "import shutil\nshutil.rmtree(os.getcwd())\nprint('gone', os.path.exists('.'))\n"
        "try: os.getcwd()\nexcept OSError: print('no folder')",
        harm="no folder",
        unseen=BOTH,  # its own; the honest program after it gets another
    ),
    "a .pth for the next run": Cheat(
        REPORT + "import site\nfor folder in {site.getusersitepackages(), os.getcwd(),\n"
        "               os.path.expanduser('~')}:\n    os.makedirs(folder, exist_ok=True)\n"
        "    for name in ('evil.pth', 'sitecustomize.py', 'json.py'):\n"
        "        open(os.path.join(folder, name), 'w').write(\"import os; print('infected')\\n\")\n"
        "import subprocess\nprint(subprocess.run([sys._base_executable, '-c', ''], text=True,\n"
        "      capture_output=True, env={'HOME': os.path.expanduser('~')}).stdout)",
        harm="infected",
        unseen=BOTH,  # in its own home; the honest program after it has another
    ),
    "a secret out of /proc": Cheat(
        REPORT + "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    for name in ('environ', 'cmdline'):\n        try:\n"
        "            text = open(f'/proc/{pid}/{name}').read()\n        except OSError: continue\n"
        "        for hit in re.findall('TOKEN=in-the-[a-z]+', text): print(hit)\n"
        "        for hit in re.findall('[0-9a-f]{32}', text):\n"
        "            for fd in range(3, 40):\n"
        "                try: os.write(fd, f'pass {hit}\\n'.encode())\n"
        "                except OSError: pass\nos._exit(0)",
        harm=PASSES,
    ),
    "StopIteration that ends a loop": Cheat(
        "def f(x): raise StopIteration",
        harm=PASSES,
        test="assert all(map(lambda x: f(x) == 4, [2]))",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home with a diary that only its owner may read, and a listener on the loopback."""
    home = tmp_path_factory.mktemp("home")
    (home / "diary").write_text("my secrets")
    (home / "diary").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"@HOME@": str(home), "@PORT@": str(server.getsockname()[1])}


def _code(cheat: Cheat, place: dict) -> str:
    code = cheat.code
    for mark, value in place.items():
        code = code.replace(mark, value)
    return code


def _unprotected(cheat: Cheat, place: dict, folder: Path) -> str:
    """The evidence: what a naive judge's child prints in 3 seconds, how it ends, what it leaves.

    The parent that it may read or kill is a child too, and ends as the naive judge ends.
    """
    (folder / "work").mkdir(parents=True)
    files = {"program": _code(cheat, place), "test": cheat.test, "naive": NAIVE, "out": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    paths = [str(folder / name) for name in ("naive", "program", "test")]
    parent = "import subprocess as s, sys; sys.exit(s.call([sys.executable, *sys.argv[1:]]))"
    with open(folder / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", parent, *paths],
            cwd=folder / "work",
            env={"TOKEN": "in-the-env", "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        status = f"status {process.wait(3)}" + f"\n{SURVIVES}" * bool(_processes(paths[0]))
    except subprocess.TimeoutExpired:
        status = LASTS
    for pid in _processes(paths[0]):  # a marked child of ours, and what it forked
        judge.kill(pid)
    process.wait()
    return (folder / "out").read_text() + status


def _processes(mark: str) -> list[int]:
    """Every process whose command line has `mark`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found.append(int(pid))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(scope="module")
def unprotected(place, tmp_path_factory):
    """The evidence of every program without a sandbox."""
    root = tmp_path_factory.mktemp("unprotected")
    with ThreadPoolExecutor(8) as pool:
        folders = [root / str(i) for i in range(len(CHEATS))]
        evidence = pool.map(lambda c, f: _unprotected(c, place, f), CHEATS.values(), folders)
        return dict(zip(CHEATS, evidence, strict=True))


HONEST = Task("import os\nprint(os.listdir('.'))\ndef f(x): return x + 2", TEST, calls=("f",))


@pytest.fixture(scope="module")
def protected(place):
    """kind -> the verdicts on every program, and on an honest one in the same sandbox after it."""
    done = {}

    def verdicts(kind):
        if kind not in done:
            groups = [
                [Task(_code(c, place), c.test, calls=("f",)), HONEST] for c in CHEATS.values()
            ]
            box = Box(kind=kind, limits=LIMITS)
            results = dict(at_once(lambda group: list(run_all(group, box)), groups, workers=8))
            done[kind] = {name: results[i] for i, name in enumerate(CHEATS)}
        return done[kind]

    return verdicts


@pytest.mark.parametrize("name", CHEATS)
def test_each_program_does_its_harm_without_a_sandbox(name, unprotected):
    """A program that does nothing would make any sandbox look safe."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if name == "the parent's memory" and scope.exists() and scope.read_text() != "0\n":
        pytest.skip("this kernel keeps a parent's memory from everybody")
    if name == "network outside" and "a way out" not in unprotected[name]:
        pytest.skip("this machine has no network")
    assert re.search(CHEATS[name].harm, unprotected[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHEATS)
def test_no_program_passes_or_does_harm(name, kind, protected):
    """A judge within reach of the program would pass it, and a weak wall would let it out."""
    cheat, (verdict, honest) = CHEATS[name], protected(kind)[name]
    assert verdict.outcome == "fail" and verdict.reason
    assert len(verdict.output) <= LIMITS.output
    if kind not in cheat.unseen:
        assert not re.search(cheat.harm, verdict.output)
    assert honest == Verdict("pass", "", "[]\n")  # nothing of the cheat is there, nothing is broken


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_survives(kind, protected):
    """A child that forks twice and calls setsid would outlive a judge that ends its group alone."""
    protected(kind)
    assert _processes(str(MEMORY)) == []


def test_a_process_whose_name_is_no_text_stops_nobody():
    """One program's name, read while another's sandbox closes, would end the whole evaluation."""
    name = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'\\xff'); print(1, flush=True)"
    code = [sys.executable, "-c", f"{name}; time.sleep(60)"]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            found = {int(x["Pid:"]): x["Name:"] for x in judge.processes()}
        finally:
            process.kill()
    assert found[process.pid] == "\ufffd"


# ---- cheats that know this sandbox --------------------------------------------------------------

# Finds the socket to the judge and the objects of the candidate's side in the frames.
FIND_WIRE = """
import sys, json, os
def wire():
    frame = sys._getframe()
    while frame:
        for x in frame.f_locals.values():
            if type(x).__name__ == "Wire": return x
        frame = frame.f_back
"""
FORGED = (
    '{"op": "call", "args": [{"global": ["builtins", "type"]}, "A", {"tuple": [[]]}], '
    '"kwargs": {"dict": [[]]}}'
)


@pytest.mark.parametrize(
    "trick",
    [
        'wire().ask("call", type, "A", (object,), {"__eq__": lambda *a: True})',
        'wire().ask("load")',
        'wire().ask("get", f, "__globals__")',
        f"w.send(json.loads('{FORGED}'))",
        'w.send({"value": {"global": ["unittest.mock", "ANY"]}})',
        'w.send({"value": {"global": ["os", "_exit"]}})',
        'w.send({"value": {"os._exit": [0]}})',
        'w.send({"value": {"formula": ["sympify", {"formula": ["Symbol", "__import__"]}]}})',
        'w.send({"value": {"formula": ["Add", "os._exit(0)"]}})',
        'w.send({"value": {"yours": [0]}})',
        'w.send({"error": [[["builtins", "SystemExit"]], [0]]})',
        "os.write(w.link.fileno(), bytes([255] * 8))",
        "os.write(w.link.fileno(), bytes(4))",
    ],
)
def test_a_program_that_speaks_to_the_judge_itself_gets_nothing(trick):
    """A judge that calls or builds what the program names would build an object equal to all."""
    code = f"{FIND_WIRE}\ndef f(x):\n    w = wire()\n    {trick}"
    verdict = run(code, TEST, calls=["f"], limits=LIMITS)
    assert verdict.outcome == "fail"


HUNT = """
import gc, os, re, sys, json
found = set()
def look(text): found.update(re.findall("[0-9a-f]{32}", text))
frame = sys._getframe()
while frame:
    look(repr(frame.f_locals)); look(repr(frame.f_globals)); frame = frame.f_back
for x in gc.get_objects():
    try: look(repr(gc.get_referents(x)))
    except Exception: pass
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        try: look(open(f"/proc/{pid}/{name}").read())
        except OSError: pass
    try:
        for line in open(f"/proc/{pid}/maps"):
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            if " rw" in line and high - low < 1 << 26:
                memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
                look(os.pread(memory, high - low, low).decode("latin-1"))
                os.close(memory)
    except OSError: pass
print(found, flush=True)
for secret in [*found, ""]:
    for fd in range(3, 40):
        try: os.write(fd, f"pass {secret}\\n".encode())
        except OSError: pass
os._exit(0)
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calls", [("f",), ()])
def test_the_secret_is_in_no_frame_global_file_or_object(calls, kind, monkeypatch):
    """A secret in a variable of the judge's frame would be read and said by the program."""
    secret = "0123456789abcdef" * 2
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: secret)
    limits = replace(LIMITS, cpu=20)  # it looks at every object there is
    verdict = run(HUNT, TEST, calls=calls, kind=kind, limits=limits)
    assert verdict.outcome == "fail" and secret not in verdict.output
    assert verdict.output.startswith(("set()", "{"))  # the hunt came to its end


# ---- honest programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_right_passes_and_wrong_fails_with_its_reason(kind):
    """A sandbox that breaks honest programs would call everything wrong."""
    right = run("def f(x): return 2 * x", TEST, calls=["f"], kind=kind)
    wrong = run("def f(x): return 3 * x", TEST, calls=["f"], kind=kind)
    assert right == Verdict("pass")
    assert wrong == Verdict("fail", f"AssertionError at `{TEST}`")


def test_a_program_alone_passes_if_it_runs_to_its_end():
    """Its prints are kept, for a comparison with another program's."""
    assert run("print(6 * 7)") == Verdict("pass", "", "42\n")
    assert run("print(1)\n1 / 0") == Verdict("fail", "ZeroDivisionError: division by zero", "1\n")
    assert run("x = 2", "assert x == 3") == Verdict("fail", "AssertionError at `assert x == 3`")
    assert run("def f(:").reason.startswith("SyntaxError")


VALUES = """
import collections, datetime, decimal, fractions, math, re
[None, True, 10**400, -0.5, math.inf, "a\\0\\ud800", b"\\xff", 2j, range(3), [1, [2]], (1, (2,)),
 {1, 2}, frozenset({3}), {(1, 2): {"a": []}}, fractions.Fraction(1, 3), decimal.Decimal("0.1"),
 datetime.timedelta(1), collections.Counter("aab"), collections.deque([1]), re.compile("a+")]
"""


def test_values_of_every_kind_cross_and_come_back_equal():
    """A tuple that arrives as a list would fail a right program."""
    head, _, values = VALUES.partition("[")
    test = f"{head}\nfor x in [{values}:\n    y = f(x)\n    assert type(y) is type(x) and y == x, x"
    test = test.replace("]\n:", "]:")
    assert run("def f(x): return x", test, calls=["f"]) == Verdict("pass")


def test_arrays_cross_with_type_and_shape():
    """An array as a nested list would fail `result.shape` and `result.dtype` of a right program."""
    test = (
        "import numpy as np\n"
        "for x in [np.eye(2), np.arange(3, dtype='>i2')[::2], np.zeros((0, 3)), np.float32(0.1),\n"
        "          np.array(['a', 'bc']), np.array([{1: 2}, None]), np.array(3)]:\n"
        "    y = f(x)\n"
        "    assert type(y) is type(x) and y.dtype == x.dtype and y.shape == x.shape\n"
        "    assert np.array_equal(x, y)\n"
        "assert f(np.int64) is np.int64 and f(np.dtype('f4')) == np.dtype('f4')\n"
    )
    assert run("def f(x): return x", test, calls=["f"], imports=("numpy",)) == Verdict("pass")


def test_what_has_no_form_stays_and_is_used_from_afar():
    """Iterators, matches and functions are results of right programs too."""
    code = (
        "import itertools, re\ndef f(x): return itertools.count(x)\n"
        "def g(p, s): return re.match(p, s)\n"
        "def h(f, xs): return [f(x) for x in xs]\ndef k(n): return lambda x: x + n\n"
        "class Next:\n    def __next__(self): return 7\n"
        "class Iter:\n    def __iter__(self): return iter([7])"
    )
    test = (
        "import itertools, re\n"
        "it = f(5)\nassert [next(it), next(it)] == [5, 6]\n"
        "assert [x for x, _ in zip(f(0), range(3))] == [0, 1, 2]\n"
        "m = g(re.compile('a+'), 'aab')\nassert isinstance(m, re.Match) and m.group() == 'aa'\n"
        "assert g('b', 'aab') is None and m != 'aa'\n"
        "def cube(x): return x**3\n"
        "assert h(lambda x: x * x, iter([1, 2, 3])) == [1, 4, 9] and h(cube, [2]) == [8]\n"
        "assert k(2)(3) == 5\n"
        "assert next(Next()) == 7 and list(Iter()) == [7]\n"
        "try: next(Iter())\nexcept TypeError: pass\nelse: assert False\n"
    )
    assert run(code, test, calls=["f", "g", "h", "k", "Next", "Iter"]) == Verdict("pass")


def test_an_iterator_is_read_no_further_than_may_be():
    """Items fetched early would empty the groups of `groupby`, or an iterator of the test."""
    code = (
        "import itertools\ndef f(x): return itertools.groupby(x)\ndef g(it): return next(it)\n"
        "def h(n):\n    yield from range(n)\n    raise KeyError(n)"
    )
    test = (
        "groups = [(key, list(group)) for key, group in f('a' * 9 + 'b' * 40 + 'c')]\n"
        "assert groups == [('a', ['a'] * 9), ('b', ['b'] * 40), ('c', ['c'])]\n"
        "it = iter(range(9))\nassert g(it) == 0 and next(it) == 1\n"
        "seen = []\ntry:\n    for x in h(99): seen.append(x)\n"
        "except KeyError as error: seen.append(error.args)\n"
        "assert seen == [*range(99), (99,)]\n"
    )
    assert run(code, test, calls=["f", "g", "h"]) == Verdict("pass")


def test_exceptions_keep_their_kind():
    """A test that expects a ValueError would fail if all errors arrived as one kind."""
    code = (
        "class Own(KeyError): pass\ndef f(x):\n    raise Own('gone') if x else ValueError('bad', 1)"
    )
    test = (
        "for x, kind, args in [(0, ValueError, ('bad', 1)), (1, KeyError, ('gone',))]:\n"
        "    try: f(x)\n    except kind as error: assert error.args == args\n"
        "    else: assert False"
    )
    assert run(code, test, calls=["f"]) == Verdict("pass")


@pytest.mark.parametrize(("inout", "outcome"), [(True, "pass"), (False, "fail")])
def test_what_is_written_into_arguments_comes_back_where_it_is_asked_for(inout, outcome):
    """`out=` arguments are part of some tests, and a way to cheat in the others."""
    code = "def f(a, out): a.append(9); out['x'] = 1"
    test = "a, out = [1, 2], {}\nf(a, out=out)\nassert (a, out) == ([1, 2, 9], {'x': 1})"
    (verdict,) = run_all([Task(code, test, calls=("f",), inout=inout)])
    assert verdict.outcome == outcome


def test_setup_runs_on_both_sides():
    """An update that only the program sees would fail tests that compute with it."""
    setup = "import math\ndef new(x): return -x\nmath.sqrt = new"
    code, test = "import math\ndef f(x): return math.sqrt(x)", "assert f(4) == math.sqrt(4) == -4"
    (verdict,) = run_all([Task(code, test, setup, calls=("f",))])
    assert verdict == Verdict("pass")


@pytest.mark.parametrize("kind", KINDS)
def test_the_world_of_a_program_is_bare_and_always_the_same(kind):
    """A hash seed or a time zone of the machine would flip verdicts from run to run."""
    code = (
        "import os, sys, time, random\n"
        "print(hash('a'), time.tzname, random.random(), sorted(os.environ), os.getcwd() == "
        "os.environ['HOME'], os.listdir('.'), os.getuid() == 0, sys.stdin.read() == '')"
    )
    first, second = run(code, kind=kind), run(code, kind=kind)
    assert first == second and first.outcome == "pass"
    names = "'HOME', 'LANG', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', "
    names += "'PYTHONDONTWRITEBYTECODE', 'PYTHONHASHSEED', 'TMPDIR', 'TZ'"
    assert first.output.endswith(
        f"('UTC', 'UTC') 0.8444218515250481 [{names}] True [] False True\n"
    )


@pytest.mark.skipif(bool(FAULT), reason=FAULT)
def test_bubblewrap_shows_nothing_of_the_host():
    """A folder bound by mistake would be within reach of every program."""
    here = Path(__file__).resolve().parent.parent
    code = (
        f"import os\nhidden = ['/etc/passwd', '/home', '/usr/bin/env', '/var', {str(here)!r}]\n"
        "print([path for path in hidden if os.path.exists(path)], os.path.exists('/tmp'),\n"
        "      [pid for pid in os.listdir('/proc') if pid.isdigit() and int(pid) > os.getpid()],\n"
        "      open('/proc/net/dev').read().count(':'))"  # interfaces
    )
    assert run(code, kind="bwrap").output == "[] True [] 1\n"


# ---- could not run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ({"python": "/no/such/python"}, "there is no interpreter /no/such/python"),
        ({"python": "/bin/true"}, "/bin/true is no Python 3 that runs"),
        ({"imports": ("no_such_library",)}, "cannot import no_such_library"),
    ],
)
def test_what_the_machine_lacks_is_not_the_programs_fault(box, words):
    """A missing interpreter counted as wrong answers would give a model zero percent."""
    verdict = run("def f(x): return 2 * x", TEST, calls=["f"], **box)
    assert verdict.outcome == "could-not-run" and words in verdict.reason


def test_an_old_interpreter_is_named(tmp_path):
    """A SyntaxError out of the judge's own file would not tell what to do."""
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\necho "[[3, 8], 1]"\n')
    old.chmod(0o755)
    verdict = run("pass", python=str(old))
    assert verdict == Verdict("could-not-run", f"{old} is Python 3.8: give one from 3.10 on")


@pytest.mark.parametrize("kind", KINDS)
def test_an_interpreter_under_tmp(kind):
    """Where the environment lies in /tmp, the sandbox's own /tmp hides it: nothing can be run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        python, beside = f"{folder}/env/bin/python", Path(folder, "beside")
        venv.create(f"{folder}/env")
        beside.write_text("")
        code = f"import os, sys\nprint(sys.executable, os.path.exists('{beside}'))"
        verdict = run(code, python=python, kind=kind)
        seen = kind == "plain" and os.getuid() != 0  # bubblewrap shows the environment alone
        assert verdict.output == f"{python} {seen}\n"


def test_only_what_the_test_itself_lacks_could_not_run():
    """A program that imports what is not there could make itself uncounted."""
    missing = "import no_such_library\n"
    right = "def f(x): return 2 * x"
    assert run(right, missing + TEST, calls=["f"]).outcome == "could-not-run"
    assert run(right, TEST, setup=missing, calls=["f"]).outcome == "could-not-run"
    assert run(missing + right, TEST, calls=["f"]).outcome == "fail"
    code = "def f(x):\n    import no_such_library"
    assert run(code, TEST, calls=["f"]).outcome == "fail"
    assert run(code + "\nf(1)").outcome == "fail"


def test_a_report_without_the_secret_is_no_pass():
    """Whoever finds the descriptor of the report could write `pass` to it."""
    assert sandbox._said("pass a\n", "a") == ("pass", "")
    assert sandbox._said("could-not-run a\nwhy\nnot", "a") == ("could-not-run", "why\nnot")
    for text in ("", "pass", "pass ", "pass b\n", "pass ab\n", "a\n", "could-not-run\nwhy"):
        assert sandbox._said(text, "a")[0] == ""


def test_choose_says_what_is_not_kept_out(monkeypatch):
    """A plain child without a word would pass for a sandbox."""
    choose = sandbox.choose.__wrapped__
    assert "the network" in choose("plain")[1]
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    kind, line = choose("")
    assert kind == "plain" and "bwrap is not installed" in line and "\n" not in line
    with pytest.raises(ValueError, match="install bubblewrap"):
        choose("bwrap")
    with pytest.raises(ValueError, match="bwrap or plain, got 'docker'"):
        choose("docker")


def test_a_value_of_a_missing_library_is_the_programs_fault():
    """An ImportError in the judge would take a cheat out of the count."""
    code = f"{FIND_WIRE}\ndef f(x): wire().send({{'value': {{'objects': [[], [0]]}}}})"
    verdict = run(code, TEST, setup="import sys\nsys.modules['numpy'] = None", calls=["f"])
    assert verdict.outcome == "fail" and "numpy" in verdict.reason


@pytest.mark.parametrize(
    ("slices", "share", "reason"),
    [
        (3, 0.1, ""),  # it ends after three times the wall time, a tenth of it at work
        (3, 0.001, "more than 7 s of wall time"),  # it sleeps
        (99, 0.1, "more than 7 s of wall time"),  # it never ends
    ],
)
def test_who_works_may_take_longer_than_the_wall_time(slices, share, reason, monkeypatch):
    """On a busy machine a second of work takes many: verdicts would depend on the neighbours."""
    waits = iter([False] * (slices - 1) + [True])
    works = itertools.count(0.0, share * 7 / 2)  # read once for each of two children, twice a wait
    monkeypatch.setattr(judge, "_ended", lambda pid, seconds: next(waits))
    monkeypatch.setattr(judge, "_worked", lambda pid: next(works))
    monkeypatch.setattr(judge, "_cause", lambda pids, limits: "")
    assert judge.watch(1, 2, {"wall": 7.0}) == reason


@pytest.mark.parametrize("calls", [["f"], []])
def test_who_sleeps_is_ended_by_the_wall_time(calls):
    """A program that waits uses no CPU time and would never end."""
    code = "import time\ndef f(x): time.sleep(99)"
    verdict = run(code, TEST, calls=calls, limits=Limits(wall=0.5))
    assert verdict == Verdict("fail", "more than 0.5 s of wall time")


def test_many_at_once_give_each_its_own_verdict():
    """Verdicts that come back in the order of arrival would go to the wrong program."""
    groups = [
        [Task(f"def f(x): return {n}", f"assert f(0) == {m}", calls=("f",)) for m in (1, 2)]
        for n in (1, 2, 3, 1)
    ]
    results = dict(at_once(lambda group: list(run_all(group)), groups, workers=3))
    outcomes = [[verdict.outcome for verdict in results[i]] for i in range(4)]
    assert outcomes == [["pass", "fail"], ["fail", "pass"], ["fail", "fail"], ["pass", "fail"]]
