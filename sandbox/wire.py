"""What may cross between a judge and a candidate: frames of JSON, and values that are safe to read.

A result arrives as a builtin type, an array, a tensor or a formula, built here by name from a short
list: never as an object that brings code, or an `__eq__`, of its own. What has no such form stays
where it is, and a `Remote` stands for it.

Runs inside the sandbox, in the interpreter of the box: the standard library alone is needed.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import select
import struct
import sys
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
SMALL = 1 << 64  # a longer int goes in hexadecimal: decimal digits take quadratic time
COPIED = 1 << 20  # bytes: up to here a tensor shares no memory, so that `out=` may resize it
BUILTIN = (int, float, str, bytes, tuple, list, dict, set, frozenset)  # what subclasses become
# Classes that are built anew from these arguments of their constructor.
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


def _flat(x: list) -> bool:
    """Are all items plain, so that the list is JSON as it stands?"""
    kinds = set(map(type, x))
    return kinds <= PLAIN and (
        int not in kinds or kinds == {int} and -SMALL < min(x) <= max(x) < SMALL
    )


def pack(x: object, wire: Wire) -> object:
    """`x` as JSON; what has no form here stays, and is named by a number (`Remote`)."""
    kind = type(x)
    if kind is int and not -SMALL < x < SMALL:
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
        flat = flat.clone() if len(flat) < COPIED else flat
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


def unpack(y: object, wire: Wire) -> object:
    """The value that JSON `y` stands for. Only classes named here are ever built."""
    if type(y) in PLAIN:
        return y
    if type(y) is list:
        return y if PLAIN.issuperset(map(type, y)) else [unpack(item, wire) for item in y]
    ((tag, data),) = y.items()
    return UNPACK[tag](data, wire)


def _library(name: str) -> types.ModuleType:
    """TypeError where it is missing: an ImportError would be the judge's own, not the program's."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TypeError(f"a value of {name} cannot be read here") from None


def _unpack_built(data, wire):
    module, name, args = data
    if (module, name) not in BUILT:
        raise TypeError(f"{module}.{name} may not cross")
    home = importlib.import_module(module)
    make = home.compile if name == "Pattern" else getattr(home, name)
    return make(*unpack(args, wire))


def _unpack_array(data, wire):
    dtype, shape, place, scalar = str(data[0]), *data[1:]
    numpy = _library("numpy")
    raw = wire.got[place]
    x = (numpy.frombuffer(raw, dtype) if raw else numpy.empty(0, dtype)).reshape(shape)
    return x[()] if scalar else x


def _unpack_objects(data, wire):
    shape, items = data
    x = _library("numpy").empty(len(items), dtype=object)
    for i, item in enumerate(items):
        x[i] = unpack(item, wire)
    return x.reshape(shape)


def _unpack_tensor(data, wire):
    name, shape, place, grad = data
    torch = _library("torch")
    raw, dtype = wire.got[place], _torch_dtype(name, wire)
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    flat = flat.clone() if len(raw) < COPIED else flat
    return flat.reshape(shape).requires_grad_(grad)


def _torch_dtype(name, wire):
    torch = _library("torch")
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} may not cross")
    return dtype


def _unpack_formula(data, wire):
    sympy = _library("sympy")
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
    "dtype": lambda data, wire: _library("numpy").dtype(str(data)),
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


def _call(function, *args, **kwargs):
    return function(*args, **kwargs)


class Gone(BaseException):
    """The candidate's process has ended. No `except Exception` of a test may swallow it."""


class Wire:
    """The socket between judge and candidate, and the objects that each holds for the other."""

    def __init__(self, fd: int, trusting: bool, inout: bool = False):
        self.serves = {"call": _call, "iter": iter, "take": self.take}  # what the other may ask
        self.fd, self.trusting, self.inout = fd, trusting, inout
        self.held, self.late = [], {}  # objects the other side has numbers of; errors by iterator
        self.blobs, self.got = [], []  # bytes of arrays beside the message that goes, that came
        self.gone, self.relayed = False, []  # has it ended? the exceptions that came from there

    def blob(self, raw: memoryview) -> int:
        self.blobs.append(raw)
        return len(self.blobs) - 1

    def ask(self, op: str, *args, **kwargs) -> object:
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
            self.relayed.append(self._exception(*reply["error"]))
            raise self.relayed[-1]
        return unpack(reply["value"], self)

    def serve(self, message: dict) -> dict:
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
            # What a SyntaxError says is no argument of it.
            args = [str(error)] if isinstance(error, SyntaxError) else error.args
            plain = [x if type(x) in PLAIN else str(x) for x in args]
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

    def take(self, iterator, most: int) -> list:
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
                if isinstance(error, SyntaxError):
                    error.msg = args[0] if args else ""
                return error
        return RuntimeError(f"{kinds[0][1]}: {args}")


def refill(old: object, new: object) -> None:
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
