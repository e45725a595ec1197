"""Inside the sandbox: a judge that holds the test, and a candidate that never sees it.

`sandbox.py` starts this file in the interpreter of the benchmark; the standard library is all it
uses, and it is read by that interpreter alone. Three kinds of process:

    keeper      imports the libraries once, forks the other two for each test, ends and reaps all
    candidate   runs the untrusted program, then answers calls of its functions over a socket
    judge       runs the test; `f(x)` in it is a call over that socket

What the candidate can send are JSON values, brought here to builtin types (and arrays, tensors,
formulas): never an object with an `__eq__` of its own. The judge alone reads the expected values
and the secret, after the candidate was forked, and says the secret after the last assertion.
Keeper and judge are not dumpable: the kernel keeps their memory and files from the candidate.
"""

import base64
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
import struct
import sys
import tempfile
import types
import zlib

# ---- frames: a length of four bytes, JSON, then bare bytes --------------------------------------

MAX_FRAME = 1 << 28  # bytes of JSON


def send(fd: int, message: object, blobs: tuple | list = ()) -> None:
    """Write one frame. Raises OSError where nobody reads any more."""
    data = json.dumps([message, [len(blob) for blob in blobs]]).encode()
    for part in (struct.pack(">I", len(data)), data, *blobs):
        part = memoryview(part)
        while part:
            part = part[os.write(fd, part) :]


def receive(fd: int, timeout: float | None = None) -> tuple[object, list[bytearray]]:
    """Read one frame; EOFError at the end, TimeoutError after `timeout` seconds without a byte."""
    (size,) = struct.unpack(">I", _read(fd, 4, timeout))
    if size > MAX_FRAME:
        raise ValueError("a message is too long")
    message, sizes = json.loads(_read(fd, size, timeout))
    return message, [_read(fd, size, timeout) for size in sizes]


def _read(fd: int, size: int, timeout: float | None) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        if timeout is not None and not select.select([fd], [], [], timeout)[0]:
            raise TimeoutError
        got = os.readv(fd, [rest])
        if not got:
            raise EOFError
        rest = rest[got:]
    return data


# ---- values: what may cross, and as what it arrives ---------------------------------------------

PLAIN = frozenset({type(None), bool, int, float, str})
SMALL = 1 << 64
BUILTIN = (int, float, str, bytes, tuple, list, dict, set, frozenset)  # what subclasses become
# Classes whose constructor takes what `__reduce__` or `vars` of their type gives here.
BUILT = {
    ("builtins", "complex"): lambda x: (x.real, x.imag),
    ("builtins", "range"): lambda x: (x.start, x.stop, x.step),
    ("builtins", "slice"): lambda x: (x.start, x.stop, x.step),
    ("fractions", "Fraction"): lambda x: (x.numerator, x.denominator),
    ("decimal", "Decimal"): lambda x: (str(x),),
    ("collections", "Counter"): lambda x: (dict(x),),
    ("collections", "deque"): lambda x: (list(x), x.maxlen),
    ("datetime", "date"): lambda x: (x.year, x.month, x.day),
    ("datetime", "timedelta"): lambda x: (x.days, x.seconds, x.microseconds),
    ("re", "Pattern"): lambda x: (x.pattern, x.flags),
}
KINDS = ("re", "itertools")  # modules whose types `isinstance` may see through a Remote


class Remote:
    """An object that stays on the other side: calls, attributes and iteration go there.

    Comparison does not: a Remote equals itself alone.
    """

    def __init__(self, wire, number, kind):
        self._wire, self._number, self._kind = wire, number, kind
        self._ahead, self._step = [], 1  # items that came early, and how many to ask for

    @property
    def __class__(self):
        module, name = self._kind
        kind = getattr(sys.modules.get(module), name, None) if module in KINDS else None
        return kind if isinstance(kind, type) else Remote

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._wire.ask("get", self, name)

    def __call__(self, *args, **kwargs):
        return self._wire.ask("call", self, *args, **kwargs)

    def __iter__(self):
        return self._wire.ask("iter", self)

    def __next__(self):
        if not self._ahead:
            self._ahead = self._wire.ask("take", self, int(self._step))[::-1]
            # The program must not see how far its test has read into an iterator it was given.
            self._step = 1 if self._wire.trusting else min(1024, self._step * 1.5)
        if not self._ahead:
            raise StopIteration
        return self._ahead.pop()

    def __len__(self):
        return self._wire.ask("len", self)

    def __getitem__(self, key):
        return self._wire.ask("item", self, key)


def _flat(x):
    kinds = set(map(type, x))
    return kinds <= PLAIN and (
        int not in kinds or kinds == {int} and -SMALL < min(x) <= max(x) < SMALL
    )


def pack(x, wire):
    """`x` as JSON; what has no form here stays, and is named by a number (`Remote`)."""
    kind = type(x)
    if kind is int and not -SMALL < x < SMALL:  # decimal digits would take quadratic time
        return {"int": hex(x)}
    if kind in PLAIN:
        return x
    if kind is list:
        return x if _flat(x) else [pack(item, wire) for item in x]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: pack(list(x), wire)}
    if kind is dict:
        return {"dict": [[pack(key, wire), pack(value, wire)] for key, value in x.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(x).decode()}
    if kind is Remote:
        return {"yours": x._number}
    return _pack_library(x, kind, wire)


def _pack_library(x, kind, wire):
    name = (kind.__module__, kind.__qualname__)
    numpy, torch, sympy = (sys.modules.get(m) for m in ("numpy", "torch", "sympy"))
    if name in BUILT:
        return {"built": [*name, pack(list(BUILT[name](x)), wire)]}
    if numpy and isinstance(x, numpy.ndarray | numpy.generic):
        return _pack_array(numpy.asarray(x), isinstance(x, numpy.generic), wire)
    if numpy and isinstance(x, numpy.dtype):
        return {"dtype": x.str}
    if torch and isinstance(x, torch.Tensor) and x.layout is torch.strided:
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        place = wire.blob(flat.numpy().data)
        return {"tensor": [str(x.dtype)[6:], list(x.shape), place, x.requires_grad]}
    if torch and isinstance(x, torch.dtype):
        return {"torch": str(x)[6:]}
    if sympy and isinstance(x, sympy.Basic):
        return {"sympy": _pack_formula(x)}
    for base in BUILTIN:
        if isinstance(x, base):
            return pack(base(x), wire)
    home, path = getattr(x, "__module__", None) or "builtins", getattr(x, "__qualname__", None)
    named = type if wire.trusting else type | types.FunctionType | types.BuiltinFunctionType
    if isinstance(x, named) and path and getattr(sys.modules.get(home), path, None) is x:
        if not wire.trusting or _class_for_judge(home, path):
            return {"global": [home, path]}
    wire.held.append(x)
    return {"mine": [len(wire.held) - 1, *name]}


def _pack_array(x, scalar, wire):
    if x.dtype.hasobject or x.dtype.names:
        return {"objects": [list(x.shape), [pack(item, wire) for item in x.ravel().tolist()]]}
    flat = sys.modules["numpy"].ascontiguousarray(x).reshape(-1)
    place = wire.blob(flat.view("u1").data if flat.nbytes else b"")
    return {"array": [x.dtype.str, list(x.shape), place, scalar]}


def _pack_formula(x):
    """A sympy expression as [class, argument, ...]; only atoms hold text, so nothing is parsed."""
    name = type(x).__name__
    if name in ("Symbol", "Dummy"):
        return ["Symbol", x.name]
    if x.is_Rational:
        return ["Rational", int(x.p), int(x.q)]
    if x.is_Float:
        return ["Float", repr(float(x))]
    undefined = getattr(type(x), "_undef_sympify", None) or not hasattr(sys.modules["sympy"], name)
    return [f"f:{name}" if undefined and x.args else name, *map(_pack_formula, x.args)]


def unpack(y, wire):
    """The value that JSON `y` stands for. Only classes named here are ever built."""
    if type(y) in PLAIN:
        return y
    if type(y) is list:
        return y if PLAIN.issuperset(map(type, y)) else [unpack(item, wire) for item in y]
    ((tag, data),) = y.items()
    return UNPACK[tag](data, wire)


def _unpack_built(data, wire):
    module, name, args = data
    if (module, name) not in BUILT:
        raise TypeError(f"{module}.{name} may not cross")
    home = importlib.import_module(module)
    make = home.compile if name == "Pattern" else getattr(home, name)
    return make(*unpack(args, wire))


def _unpack_array(data, wire):
    dtype, shape, place, scalar = data
    numpy = importlib.import_module("numpy")
    raw = wire.got[place]
    x = (numpy.frombuffer(raw, dtype) if raw else numpy.empty(0, dtype)).reshape(shape)
    return x[()] if scalar else x


def _unpack_objects(data, wire):
    shape, items = data
    x = importlib.import_module("numpy").empty(len(items), dtype=object)
    for i, item in enumerate(items):
        x[i] = unpack(item, wire)
    return x.reshape(shape)


def _unpack_tensor(data, wire):
    name, shape, place, grad = data
    torch = importlib.import_module("torch")
    raw, dtype = wire.got[place], _torch_dtype(name, wire)
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    if len(raw) < 1 << 20:
        flat = flat.clone()  # so that `out=` may resize it
    return flat.reshape(shape).requires_grad_(grad)


def _torch_dtype(name, wire):
    torch = importlib.import_module("torch")
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} may not cross")
    return dtype


def _unpack_formula(data, wire):
    sympy = importlib.import_module("sympy")
    name, *args = data
    if name in ("Symbol", "Rational", "Float"):
        return getattr(sympy, name)(*(str(x) if name != "Rational" else int(x) for x in args))
    args = [_unpack_formula(x, wire) for x in args]
    if name.startswith("f:"):
        return sympy.Function(name[2:])(*args)
    known = {"NegativeOne": -1, "ImaginaryUnit": sympy.I, "Exp1": sympy.E, "Pi": sympy.pi}
    known |= {"BooleanTrue": sympy.true, "BooleanFalse": sympy.false, "Infinity": sympy.oo}
    if name in known:
        return sympy.sympify(known[name])
    make = getattr(sympy, name)
    if not (isinstance(make, type) and issubclass(make, sympy.Basic)):
        raise TypeError(f"sympy.{name} may not cross")
    return make(*args)


def _unpack_global(data, wire):
    """A class or function by its name, where `wire` trusts the other side; else a plain class."""
    module, name = data
    if wire.trusting:
        return getattr(importlib.import_module(module), name)
    if not (found := _class_for_judge(module, name)):
        raise TypeError(f"{module}.{name} may not cross")
    return found


def _class_for_judge(module, name):
    """What BUILTIN has and numpy's scalars. `type` itself could build an object equal to all."""
    if module == "builtins":
        return {kind.__name__: kind for kind in (bool, complex, *BUILTIN)}.get(name)
    numpy = sys.modules.get("numpy")
    found = getattr(numpy, name, None) if module == "numpy" else None
    return found if isinstance(found, type) and issubclass(found, numpy.generic) else None


UNPACK = {
    "tuple": lambda data, wire: tuple(unpack(data, wire)),
    "set": lambda data, wire: set(unpack(data, wire)),
    "frozenset": lambda data, wire: frozenset(unpack(data, wire)),
    "dict": lambda data, wire: {unpack(k, wire): unpack(v, wire) for k, v in data},
    "int": lambda data, wire: int(data, 16),
    "bytes": lambda data, wire: base64.b64decode(data),
    "dtype": lambda data, wire: importlib.import_module("numpy").dtype(data),
    "mine": lambda data, wire: Remote(wire, data[0], tuple(data[1:])),
    "yours": lambda data, wire: wire.held[data],
    "built": _unpack_built,
    "array": _unpack_array,
    "objects": _unpack_objects,
    "tensor": _unpack_tensor,
    "torch": _torch_dtype,
    "sympy": _unpack_formula,
    "global": _unpack_global,
}


# ---- the wire: one side asks, the other serves, and may ask back --------------------------------


class Gone(BaseException):
    """The candidate's process has ended. No `except Exception` of a test may swallow it."""


class Wire:
    """The socket between judge and candidate, and the objects that each holds for the other."""

    def __init__(self, fd, serves, trusting, inout=False):
        self.fd, self.serves, self.trusting, self.inout = fd, serves, trusting, inout
        self.held, self.late = [], {}  # objects the other side has numbers of; errors by iterator
        self.blobs, self.got = [], []  # bytes of arrays beside the message that goes, that came
        self.gone, self.relayed = False, None  # the last exception that came from there

    def blob(self, raw):
        self.blobs.append(raw)
        return len(self.blobs) - 1

    def ask(self, op, *args, **kwargs):
        """Have the other side do `op`; returns its value or raises its exception."""
        self.blobs = []
        named = {key: pack(value, self) for key, value in kwargs.items()}
        message = {"op": op, "args": [pack(x, self) for x in args], "kwargs": named}
        try:
            send(self.fd, message, self.blobs)
            reply, self.got = receive(self.fd)
            while "op" in reply:
                send(self.fd, self.serve(reply), self.blobs)
                reply, self.got = receive(self.fd)
        except (EOFError, OSError):
            self.gone = True
            raise Gone("the program ended before the test did") from None
        for key, new in reply.get("changed", ()) if self.inout else ():
            refill({**dict(enumerate(args)), **kwargs}[key], unpack(new, self))
        if "error" in reply:
            self.relayed = self._exception(*reply["error"])
            raise self.relayed
        return unpack(reply["value"], self)

    def serve(self, message):
        """Do what the other side asks and return the reply. Nothing raises but the end of us."""
        given, before = {}, {}
        try:
            packed = {**dict(enumerate(message["args"])), **message["kwargs"]}
            if not self.trusting and set(packed[0]) != {"yours"}:
                raise TypeError("only what the test gave away can be called")
            given = {key: unpack(x, self) for key, x in packed.items()}
            if self.inout and message["op"] == "call":
                before = {key: self._mark(x) for key, x in given.items() if hasattr(x, "__len__")}
            args = [given[i] for i in range(len(message["args"]))]
            kwargs = {key: given[key] for key in message["kwargs"]}
            value = self.serves[message["op"]](*args, **kwargs)
            self.blobs = []
            reply = {"value": pack(value, self)}
        except BaseException as error:
            self.blobs = []
            kinds = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
            plain = [x if type(x) in PLAIN else str(x) for x in error.args]
            reply = {"error": [kinds, plain]}
        changed = [key for key in before if self._mark(given[key]) != before[key]]
        reply["changed"] = [(key, pack(given[key], self)) for key in changed]
        return reply

    def _mark(self, x):
        """A checksum of a value: has the program written into it?"""
        kept, self.blobs = self.blobs, []
        mark = zlib.crc32(json.dumps(pack(x, self)).encode())
        for raw in self.blobs:
            mark = zlib.crc32(raw, mark)
        self.blobs = kept
        return mark

    def take(self, iterator, most):
        """Up to `most` next items, fewer at an end, an error, or an item that is not plain."""
        items = []
        try:
            if error := self.late.pop(id(iterator), None):
                raise error
            while len(items) < most:
                items.append(next(iterator))
                parts = items[-1] if type(items[-1]) is tuple else items[-1:]
                if not PLAIN.issuperset(map(type, parts)):  # it may depend on what comes next
                    break
        except StopIteration:
            pass
        except Exception as error:
            if not items:
                raise
            self.late[id(iterator)] = error
        return items

    def _exception(self, kinds, args):
        """The nearest class that this side knows too, unless it would end a loop quietly."""
        for module, name in kinds:
            kind = getattr(sys.modules.get(module), name, None)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
                error = kind.__new__(kind, *args)
                error.args = tuple(args)
                return error
        return RuntimeError(f"{kinds[0][1]}: {args}")


def refill(old, new):
    """Give `old` the contents of `new`: what the program wrote into an argument of the test."""
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)
    elif hasattr(old, "copy_"):  # a tensor
        old.data = new
    elif hasattr(old, "dtype"):
        old[...] = new


# ---- candidate and judge ------------------------------------------------------------------------


def limit(limits):
    """Limits of this process and of all that it starts; they can only be lowered from here on."""
    hard = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_NPROC: _threads_of_user() + limits["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for what, most in hard.items():
        resource.setrlimit(what, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))  # SIGXCPU, SIGKILL


def _threads_of_user():
    """The kernel counts threads by user; in a sandbox of its own there are but ours."""
    count, me = 0, str(os.getuid())
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/status") as file:
                status = dict(line.split(":", 1) for line in file if ":" in line)
        except OSError:  # it has ended
            continue
        count += int(status["Threads"]) if status["Uid"].split()[0] == me else 0
    return count


def new_module():
    """The namespace of a program: a real module, so that dataclasses and the like work."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    return vars(module)


def run(source, name, space):
    exec(compile(source, name, "exec", dont_inherit=True), space)


def candidate(fd, job):
    """Serve the judge until it hangs up: run the program, call its functions."""
    close_stdin()
    space = new_module()

    def load():
        run(job["setup"], "<setup>", space)
        run(job["program"], "<program>", space)

    def find(name):
        if name not in space:
            raise NameError(f"the program defines no {name}")
        return space[name]

    serves = {"load": load, "find": find, "call": lambda f, *args, **kwargs: f(*args, **kwargs)}
    serves |= {"get": getattr, "iter": iter, "len": len, "item": operator.getitem}
    wire = Wire(fd, serves, trusting=True, inout=job["inout"])
    serves["take"] = wire.take
    while True:
        message, wire.got = receive(fd)
        reply = wire.serve(message)
        sys.stdout.flush()
        send(fd, reply, wire.blobs)


def judge(fd, report, job):
    """Read test and secret, run the test against the candidate, say how it went."""
    request, _ = receive(0)
    serves = {"call": lambda f, *args, **kwargs: f(*args, **kwargs), "iter": iter}
    wire = Wire(fd, serves, trusting=False, inout=job["inout"])
    serves["take"] = wire.take
    say = {"secret": request["secret"]}
    stage = "setup"
    try:
        space = new_module()
        run(job["setup"], "<setup>", space)
        stage = "load"
        wire.ask("load")
        space.update((name, wire.ask("find", name)) for name in job["calls"])
        stage = "test"
        run(request["test"], "<test>", space)
        say |= {"outcome": "fail" if wire.gone else "pass", "reason": ""}
    except BaseException as error:
        missing = isinstance(error, ImportError) and error is not wire.relayed
        broken = stage == "setup" or missing
        say |= {"outcome": "could-not-run" if broken else "fail", "reason": explain(error, request)}
    os.write(report, json.dumps(say).encode())


def together(report, job):
    """Program and test in one process, for tests whose values cannot cross.

    The secret waits in the memory that `list.sort` hides while it calls its key: no frame, global,
    file or object that the garbage collector knows leads there.
    """
    hidden, test = _take_request()
    space = new_module()

    def work(item):  # for the empty string, while the secret behind it waits
        for text, name in () if item else _parts(job, test):
            run(text, name, space)

    try:
        hidden.sort(key=lambda item: work(item) or 0)
        say = {"outcome": "pass", "reason": "", "secret": hidden[1]}
    except BaseException as error:
        say = {"outcome": "fail", "reason": explain(error, {"test": test})}
    try:
        sys.stdout.flush()
    finally:
        os.write(report, json.dumps(say).encode())


def _take_request():
    request, _ = receive(0)
    close_stdin()
    return ["", request["secret"]], request["test"]


def close_stdin():
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _parts(job, test):
    return (job["setup"], "<setup>"), (job["program"], "<program>"), (test, "<test>")


def explain(error, request):
    """`error` in one line, with the line of the test where it came up."""
    where, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<test>":
            lines = request["test"].splitlines()
            where = lines[trace.tb_lineno - 1].strip() if trace.tb_lineno <= len(lines) else ""
        trace = trace.tb_next
    if isinstance(error, Gone):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text[:300] + (f" at `{where[:200]}`" if where else "")


# ---- the keeper ---------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18


def step_down(uid, folders):
    """From root to user `uid`, who keeps sight of `folders` where only root may look.

    A private folder on the way is covered by an empty one that holds just what is needed, in a
    mount namespace of our own. Raises OSError where the machine does not allow that.
    """
    covers = {}
    for folder in folders:
        for parent in _parents(folder):
            if not os.stat(parent).st_mode & stat.S_IXOTH:
                covers.setdefault(parent, []).append(folder)
                break
    if covers:
        _check(LIBC.unshare(CLONE_NEWNS), "unshare")
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


def _parents(folder):
    """Every folder above, the uppermost first."""
    parts = folder.strip("/").split("/")
    return ["/" + "/".join(parts[:i]) for i in range(1, len(parts))]


def _mount(source, target, kind, flags, data=None):
    names = (x and x.encode() for x in (source, target, kind))
    _check(LIBC.mount(*names, ctypes.c_ulong(flags), data), f"mount on {target}")


def _check(result, what):
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def keep(limits, alone):
    """Judge one job after the other until the host hangs up."""
    while True:
        try:
            job, _ = receive(0)
        except EOFError:
            return
        try:
            send(1, one_job(job, limits, alone))
        except OSError as error:  # no process, no memory: the machine's fault
            sweep(alone)
            send(1, {"broken": str(error)})


def one_job(job, limits, alone):
    """Fork a candidate, then a judge, wait for the verdict, end whatever is left of both."""
    ours, theirs = (end.detach() for end in socket.socketpair())
    report, say = os.pipe()
    output, null = os.memfd_create("output"), os.open(os.devnull, os.O_RDWR)
    folder = tempfile.mkdtemp()
    if job["calls"]:
        first = fork(lambda: candidate(theirs, job), [theirs], output, folder, limits)
        last = fork(lambda: judge(ours, say, job), [ours, say], null, folder, limits)
    else:
        first = last = fork(lambda: together(say, job), [say], output, folder, limits)
    for fd in (ours, theirs, say, null):
        os.close(fd)
    why = watch(first, last, limits)
    sweep(alone)
    os.lseek(output, 0, os.SEEK_SET)
    text, said = _take(report, 1 << 16), _take(output, limits["output"])
    shutil.rmtree(folder, ignore_errors=True)
    return {"report": text, "why": why, "output": said}


def _take(fd, most):
    text = os.read(fd, most).decode(errors="replace")
    os.close(fd)
    return text


def fork(work, fds, output, folder, limits):
    """Run `work` in a child that has `fds` and stdin, prints into `output`, and is limited."""
    pid = os.fork()
    if pid:
        return pid
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for fd in (1, 2):
            os.dup2(output, fd)
        for fd in set(range(3, 256)) - set(fds):
            _close(fd)
        os.chdir(folder)
        os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ.pop("PWD", None)  # bubblewrap sets it
        sys.argv = ["program"]
        limit(limits)
        work()
    finally:
        os._exit(0)


def _close(fd):
    try:
        os.close(fd)
    except OSError:
        pass


def watch(first, last, limits):
    """Wait until `last` has ended, at most the wall time; says what ended it or `first` early."""
    if not _ended(last, limits["wall"]):
        return f"more than {limits['wall']:g} s of wall time"
    _ended(first, 0.2)  # a candidate goes when its judge hangs up, unless it does not want to
    for pid in (first, last):
        done, status, usage = os.wait4(pid, os.WNOHANG)
        slow = usage.ru_utime + usage.ru_stime >= limits["cpu"]
        if done and (slow or os.WTERMSIG(status) == signal.SIGXCPU):
            return f"more than {limits['cpu']} s of CPU time"
        if done and os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        if first == last:
            break
    return ""


def _ended(pid, seconds):
    fd = os.pidfd_open(pid)
    ready = select.select([fd], [], [], seconds)[0]
    os.close(fd)
    return bool(ready)


def sweep(alone):
    """End and reap all that was started here; `alone`: one signal reaches all there is.

    What has lost its parent becomes the keeper's child, so that the loop finds it too.
    """
    while True:
        if alone:
            kill(-1)
        else:
            for pid in _children():
                kill(pid)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _children():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            yield int(pid)


def main(options):
    if options["uid"]:
        step_down(options["uid"], options["folders"])
    if options["command"]:
        os.execv(options["command"][0], options["command"])
    LIBC.prctl(PR_SET_DUMPABLE, 0)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path[:] = filter(None, sys.path)
    missing = {}
    for name in options["imports"]:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    send(1, {"missing": missing})
    keep(options["limits"], options["alone"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
