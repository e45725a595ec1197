"""What may cross between a judge and a candidate: JSON, bytes beside it, and values safe to read.

A result arrives as a builtin type, an array, a tensor or a formula, built here by name from a short
list: never as an object that brings code, or an `__eq__`, of its own. What has no such form stays
where it is, and a `Remote` stands for it.

Runs inside the sandbox, in the interpreter of the box: the standard library alone is needed.
"""

import datetime
import itertools
import json
import re
import sys
import types
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from multiprocessing.connection import Connection

PLAIN = frozenset({type(None), bool, int, float, str})
NAMED = type | types.FunctionType | types.BuiltinFunctionType
END = object()  # of an iterator
SMALL = 1 << 64  # a longer int goes in hexadecimal: decimal digits take quadratic time
BUILTIN = (int, float, str, bytes, tuple, list, dict, set, frozenset)  # what subclasses become
# Classes that are built anew from these arguments of their constructor.
BUILT = {
    int: lambda x: (hex(x), 16),
    tuple: lambda x: (list(x),),
    set: lambda x: (list(x),),
    frozenset: lambda x: (list(x),),
    dict: lambda x: (list(map(list, x.items())),),
    complex: lambda x: (x.real, x.imag),
    range: lambda x: (x.start, x.stop, x.step),
    slice: lambda x: (x.start, x.stop, x.step),
    Fraction: lambda x: (x.numerator, x.denominator),
    Decimal: lambda x: (str(x),),
    Counter: lambda x: (dict(x),),
    deque: lambda x: (list(x), x.maxlen),
    datetime.date: lambda x: (x.year, x.month, x.day),
    datetime.timedelta: lambda x: (x.days, x.seconds, x.microseconds),
    re.Pattern: lambda x: (x.pattern, x.flags),
}


def _asks(op):
    return lambda self, /, *args, **kwargs: self._wire.ask(op, self, *args, **kwargs)


def _found(module, name):
    return getattr(sys.modules.get(module), name, None)


class Remote:
    """An object that stays on the other side: calls, attributes and iteration go there.

    Comparison does not: a Remote equals itself alone.
    """

    def __init__(self, wire, number, module, name):
        self._wire, self._number, self._kind = wire, number, (module, name)

    @property
    def __class__(self):
        module, name = self._kind  # `isinstance` may see a match or an iterator behind it
        kind = _found(module, name) if module in ("re", "itertools") else None
        return kind if isinstance(kind, type) else Remote

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._wire.ask("get", self, name)

    def __next__(self):
        for item in self._wire.ask("next", self):
            return item
        raise StopIteration

    __call__, __iter__, __len__, __getitem__ = map(_asks, ("call", "iter", "len", "item"))


# ---- values of libraries: their parts, and what makes them anew from these -----------------------


def _array_parts(x, numpy):
    y = numpy.asarray(x)
    if y.dtype.hasobject or y.dtype.names:
        return "objects", y.ravel().tolist(), list(y.shape)
    return "array", y.tobytes(), y.dtype, list(y.shape), isinstance(x, numpy.generic)


def _array(raw, dtype, shape, scalar):
    numpy = import_module("numpy")
    flat = numpy.frombuffer(bytes(raw), dtype) if raw else numpy.empty(0, dtype)
    x = flat.reshape(shape).copy()
    return x[()] if scalar else x


def _tensor_parts(x, torch):
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    raw = raw.clone().numpy().tobytes()  # a copy: `out=` resizes no tensor that numpy has seen
    return "tensor", raw, x.dtype, list(x.shape), x.requires_grad


def _tensor(raw, dtype, shape, grad):
    torch = import_module("torch")
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.clone().reshape(shape).requires_grad_(grad)


def _torch_dtype(name):
    torch = import_module("torch")
    return {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}[name]


ATOMS = {"Symbol": (str,), "Float": (float,), "Rational": (int, int)}


def _formula_parts(x, sympy):
    """A sympy expression as its class and arguments, which are expressions but for ATOMS."""
    name = type(x).__name__
    if name in ("Symbol", "Dummy"):
        return "formula", "Symbol", x.name
    if x.is_Rational:
        return "formula", "Rational", int(x.p), int(x.q)
    if x.is_Float:
        return "formula", "Float", float(x)
    own = isinstance(x, sympy.core.function.AppliedUndef) or not hasattr(sympy, name)
    if own and x.args:
        return "formula", "Function", sympy.Symbol(name), *x.args
    return "formula", name, *x.args


def _formula(name, *args):
    sympy = import_module("sympy")
    if name in ATOMS:
        kinds = zip(ATOMS[name], args, strict=True)
        return getattr(sympy, name)(*(kind(x) for kind, x in kinds))
    if not all(isinstance(x, sympy.Basic) for x in args):
        raise TypeError("a formula is made of formulas")  # sympy would evaluate a text
    if name == "Function":
        return sympy.Function(str(args[0]))(*args[1:])
    make = getattr(sympy, name, None)
    if isinstance(make, type) and issubclass(make, sympy.Basic):
        return make(*args)
    if isinstance(one := getattr(sympy.S, name), sympy.Basic):  # pi, I, oo, true and the like
        return one
    raise TypeError(f"sympy.{name} may not cross")


CLASSES = {kind.__name__: kind for kind in (bool, *BUILTIN, *BUILT)}
# By name all that is ever built here. `type` is not among it: it would build one equal to all.
MAKE = CLASSES | {
    "Pattern": re.compile,
    "class": CLASSES.__getitem__,
    "array": _array,
    "objects": lambda items, shape: import_module("numpy").fromiter(items, object).reshape(shape),
    "dtype": lambda name: import_module("numpy").dtype(str(name)),
    "scalar": lambda name: import_module("numpy").dtype(str(name)).type,
    "tensor": _tensor,
    "torch": _torch_dtype,
    "formula": _formula,
}


# ---- the wire: one side asks, the other serves, and may ask back --------------------------------


class Gone(BaseException):
    """The candidate's process has ended. No `except Exception` of a test may swallow it."""


class Wire:
    """The socket between judge and candidate, and the objects that each holds for the other."""

    def __init__(self, fd: int, trusting: bool, inout: bool = False):
        self.link, self.trusting, self.inout = Connection(fd), trusting, inout
        self.held, self.gone = [], False  # objects the other side has numbers of; has it ended?
        self.blobs, self.got = [], []  # bytes beside the message that goes, that came
        self.make = MAKE | {
            "bytes beside": lambda place: self.got[place],
            "yours": lambda number: self.held[number],
            "mine": lambda *args: Remote(self, *args),
        }
        if trusting:  # its functions by name, too
            self.make["global"] = lambda home, path: getattr(import_module(home), path)
        self.serves = {  # what the other side may ask
            "call": lambda f, /, *args, **kwargs: f(*args, **kwargs),
            "iter": iter,
            "next": lambda x: [item for item in [next(x, END)] if item is not END],
        }

    def send(self, message: dict) -> None:
        """Send JSON, then what `pack` has put beside it. OSError where nobody reads any more."""
        self.link.send_bytes(json.dumps([message, len(self.blobs)]).encode())
        for blob in self.blobs:
            self.link.send_bytes(blob)
        self.blobs = []

    def receive(self) -> dict:
        """Receive a message and what comes beside it. EOFError or OSError at the end."""
        message, count = json.loads(self.link.recv_bytes())
        self.got = [self.link.recv_bytes() for _ in range(count)]
        return message

    def pack(self, x: object) -> object:
        """`x` as JSON: itself if it is plain, a list, or {name in `make`: arguments}."""
        kind = type(x)
        if kind in PLAIN and (kind is not int or -SMALL < x < SMALL):
            return x
        if kind is list:
            return [self.pack(item) for item in x]
        name, *args = self._parts(x, kind)
        return {name: self.pack(args)}

    def unpack(self, y: object) -> object:
        """The value that JSON `y` stands for. Only what `make` has is ever built."""
        if type(y) in PLAIN:
            return y
        if type(y) is list:
            return [self.unpack(item) for item in y]
        ((name, args),) = y.items()
        return self.make[name](*self.unpack(args))

    def _parts(self, x, kind):
        if kind in BUILT:
            return kind.__name__, *BUILT[kind](x)
        if kind is bytes:
            self.blobs.append(x)
            return "bytes beside", len(self.blobs) - 1
        if kind is Remote:
            return "yours", x._number
        numpy, torch, sympy = map(sys.modules.get, ("numpy", "torch", "sympy"))
        if numpy and isinstance(x, numpy.ndarray | numpy.generic):
            return _array_parts(x, numpy)
        if numpy and isinstance(x, numpy.dtype):
            return "dtype", x.str
        if torch and isinstance(x, torch.Tensor) and x.layout is torch.strided:
            return _tensor_parts(x, torch)
        if torch and isinstance(x, torch.dtype):
            return "torch", str(x)
        if sympy and isinstance(x, sympy.Basic):
            return _formula_parts(x, sympy)
        for base in BUILTIN:
            if isinstance(x, base):
                return base.__name__, base(x)
        if isinstance(x, NAMED) and CLASSES.get(x.__name__) is x:
            return "class", x.__name__
        if isinstance(x, NAMED) and not self.trusting and x.__module__ != "program":
            home, path = x.__module__ or "builtins", x.__qualname__
            if _found(home, path) is x:
                return "global", home, path
        if numpy and isinstance(x, type) and issubclass(x, numpy.generic):
            return "scalar", numpy.dtype(x).str
        self.held.append(x)
        return "mine", len(self.held) - 1, kind.__module__, kind.__qualname__

    def ask(self, op: str, /, *args, **kwargs) -> object:
        """Have the other side do `op`; returns its value or raises its exception."""
        message = {"op": op, "args": self.pack(list(args)), "kwargs": self.pack(kwargs)}
        try:
            self.send(message)
            while "op" in (reply := self.receive()):
                self.send(self.serve(reply))
        except (EOFError, OSError):
            self.gone = True
            raise Gone from None
        try:
            for place, new in reply["changed"] if self.inout else ():
                _refill([*args, *kwargs.values()][place], self.unpack(new))
            if "error" in reply:
                raise self._exception(*reply["error"])
            return self.unpack(reply["value"])
        except Exception as error:
            error.of_program = True  # no fault of the test, not even where a value cannot be read
            raise

    def serve(self, message: dict) -> dict:
        """Do what the other side asks and return the reply. Nothing raises but the end of us."""
        given, before = [], {}
        try:
            if not self.trusting and set(message["args"][0]) != {"yours"}:
                raise TypeError("only what the test gave away can be called")
            args, kwargs = self.unpack(message["args"]), self.unpack(message["kwargs"])
            given = [*args, *kwargs.values()]
            if self.inout and message["op"] == "call":
                before = {i: self._mark(x) for i, x in enumerate(given) if hasattr(x, "__len__")}
            reply = {"value": self.pack(self.serves[message["op"]](*args, **kwargs))}
        except BaseException as error:
            kinds = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
            # What a SyntaxError says is no argument of it.
            said = [str(error)] if isinstance(error, SyntaxError) else error.args
            reply = {"error": [kinds, [x if type(x) in PLAIN else str(x) for x in said]]}
        changed = [i for i, mark in before.items() if self._mark(given[i]) != mark]
        return reply | {"changed": [(i, self.pack(given[i])) for i in changed]}

    def _mark(self, x):
        """A hash of a value: has the program written into it?"""
        kept, self.blobs = self.blobs, []
        mark = hash((json.dumps(self.pack(x)), *self.blobs))
        self.blobs = kept
        return mark

    def _exception(self, kinds, args):
        """The nearest class that this side knows too, unless it would end a loop quietly."""
        for kind in itertools.starmap(_found, kinds):
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
                error = kind.__new__(kind, *args)
                error.args = tuple(args)
                if isinstance(error, SyntaxError):
                    error.msg = args[0] if args else ""
                return error
        return RuntimeError(f"{kinds[0][1]}: {args}")


def _refill(old: object, new: object) -> None:
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
