"""Whether an answer that prints the right thing has also done the job.

    shirks(old, new, code)         -> "it hides errors: try", or "" where nothing is amiss
    list(variations(old, new, code))   -> [(new, code), ...] on other inputs, the same ones in both

The rule, for an answer that runs and prints what the true code prints:

1. It hides nothing: no more `try` than the old or the true code, and no name that silences
   errors or warnings.
2. It leaves nothing out: no fewer calls, operators and subscripts than either of them.
3. It computes what it prints: where a number or a text of the program is changed in both, and the
   true code now prints something else, the answer prints that, too. What never shows in a
   program's output, (3) does not see.

So a constant in the place of a result, an `except` around the old call and a call that is simply
gone are wrong, while another spelling, an alias or a default that is left out stay right.
"""

import ast
import collections
import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator

SILENCERS = {"suppress", "catch_warnings", "filterwarnings", "simplefilter", "resetwarnings"}
SILENCERS |= {"showwarning", "captureWarnings", "_deprecations"}
TRY = tuple(getattr(ast, name) for name in ("Try", "TryStar") if hasattr(ast, name))
WORK = ast.Call, ast.BinOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.AugAssign
TRIES = 12  # variations of a program, at most: some break it, some change nothing that it prints


def shirks(old: str, new: str, code: str) -> str:
    """How an answer hides errors or leaves work out, in the words of a reason; "" if it does not.

    SyntaxError where this Python cannot read it.
    """
    *known, answer = (list(ast.walk(ast.parse(text))) for text in (old, new, code))
    if count(answer, TRY) > max(count(nodes, TRY) for nodes in known):
        return "it hides errors: try"
    if more := names(answer) & SILENCERS - names(known[0] + known[1]):
        return f"it hides errors: {min(more)}"
    if count(answer, WORK) < min(count(nodes, WORK) for nodes in known):
        return "it leaves work out: it has fewer calls and operators than the old and the true code"
    return ""


def count(nodes: list[ast.AST], kinds: tuple[type, ...]) -> int:
    return sum(isinstance(node, kinds) for node in nodes)


def names(nodes: list[ast.AST]) -> set[str]:
    """All names, attributes and names that are imported."""
    found = (getattr(node, key, "") for node in nodes for key in ("id", "attr", "name"))
    return {str(name).rpartition(".")[2] for name in found}


def variations(old: str, new: str, code: str) -> Iterator[tuple[str, str]]:
    """The true code and the answer, each time with another one of their literals changed.

    One that stands in the old code as often as in the true one, and as often in the answer, or
    never, unless that may leave it out as the value of a keyword.
    """
    in_old, in_new, in_code = (literals(ast.walk(ast.parse(text))) for text in (old, new, code))
    keywords = [node.value for node in ast.walk(ast.parse(new)) if isinstance(node, ast.keyword)]
    free = literals(keywords)  # to leave out: a default need not be written
    same = (x for x, number in in_new.items() if in_old[x] == number)
    allowed = (x for x in same if in_code[x] == in_new[x] or x not in in_code and x not in free)
    for literal in itertools.islice(allowed, TRIES):
        other = changed(literal[1])
        with contextlib.suppress(ValueError):  # of ast.unparse, for some f-strings
            yield swapped(new, literal, other), swapped(code, literal, other)


Literal = tuple[type, object]  # 1, 1.0 and True are equal: the type tells them apart


def literals(nodes: Iterable[ast.AST]) -> collections.Counter[Literal]:
    """How often each number and each text stands among the nodes."""
    return collections.Counter(
        (type(node.value), node.value)
        for node in nodes
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str)
    )


def changed(value):
    """Another number or text: the next one, as it were."""
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5
    if re.search(r"\d", value):  # a date, a table: its last digit
        return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), value)
    # A name, or "name[other]": its last letter.
    return re.sub(r"([^\W\d_])(?=[\W_]*$)", r"\1x", value)


def swapped(code: str, literal: Literal, other) -> str:
    """`code` with `other` in all places of a literal."""

    class Swap(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant(other) if (type(node.value), node.value) == literal else node

    return ast.unparse(Swap().visit(ast.parse(code)))
