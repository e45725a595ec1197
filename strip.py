"""Python code without comments, docstrings and blank lines, by `tokenize` and `ast`.

Both sides of every comparison in `reward.py` come through here. The release cut comments out with
regular expressions, which ate code between two apostrophes, and strings with `#`.
"""

import ast
import io
import tokenize
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, takewhile

# What ast.parse and tokenize raise for one input or another, in Python 3.10 to 3.14. ValueError
# covers NUL bytes and lone surrogates; MemoryError is how the parser says that its stack is full.
PARSER_ERRORS = (
    *(SyntaxError, tokenize.TokenError, ValueError, OverflowError),
    *(RecursionError, MemoryError, SystemError, IndexError),
)
# A statement of more than 20,000 tokens (fewer on a line of over 10,000 characters) does not count
# as Python: 3.10 dies of a C stack overflow in `1+1+1...` with 150,000 terms, f-strings before 3.12
# take quadratic time to parse, and 3.12.1 takes tokens times characters of the line (a comment at
# its end included) to tokenize.
MAX_WORK = 20_000 * 10_000

LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)  # tokens without text of their own
LINE_END = (tokenize.NEWLINE, tokenize.NL)

BODIES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DEEDS = (*BODIES, ast.Import, ast.ImportFrom, ast.Call, ast.Assign, ast.AugAssign)


@lru_cache(maxsize=2**14)  # a run comes back to its rows, and many an answer repeats another
def strip_comments(code: str) -> str:
    """`code` without comments, docstrings, blank lines and trailing blanks; strings untouched.

    Programs that differ only in those come out equal. A body left empty gets `pass`, so what comes
    out parses again. All leading bare strings of a body go, or else the second would be the next
    docstring. Line ends become LF. Raises SyntaxError for whatever does not parse.
    """
    source = code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n") + "\n"
    tokens, docstrings = _parse(source)
    lines, line = [], ""
    end, doc_end, after_doc = 0, 0, False
    for kind, start, stop in tokens:
        gap = source[end:start]  # indentation, blanks, or a backslash and its line end
        if start in docstrings:
            doc_end, filler = docstrings[start]
            line += gap + filler
            after_doc = not filler
        elif start < doc_end:
            pass  # the rest of a docstring of several tokens
        elif after_doc and (kind in (*LINE_END, tokenize.COMMENT) or source[start] == ";"):
            pass  # the next statement takes the docstring's place, indentation included
        elif kind in LINE_END:
            lines += [line] if line else []  # the gap before a line end is trailing blanks
            line = ""
        elif kind != tokenize.COMMENT:
            line += source[start:stop] if after_doc else gap + source[start:stop]
            after_doc = False
        end = stop
    return "\n".join(lines)


def same(code: str | None, program: str) -> bool:
    """Whether `code` is this program, comments, docstrings and blank lines aside."""
    try:
        return code is not None and strip_comments(code) == strip_comments(program)
    except SyntaxError:
        return False


def does_something(text: str) -> bool:
    """Whether a text is Python that imports, calls, defines or assigns something."""
    try:
        program = strip_comments(text)  # first: it guards the parser
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return any(isinstance(node, DEEDS) for node in ast.walk(ast.parse(program)))
    except PARSER_ERRORS:
        return False


def _parse(source: str) -> tuple[list[tuple[int, int, int]], dict[int, tuple[int, str]]]:
    """Tokens (kind, start, stop) and docstrings {start: (stop, filler)}, as offsets into `source`.

    Raises SyntaxError, whatever the parser raised, and keeps its warnings (`"\\d"`) to itself.
    """
    rows = source.split("\n")  # not splitlines: a form feed ends no line of Python
    starts = list(accumulate((len(row) + 1 for row in rows), initial=0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = list(_tokens(source, starts))  # first: it guards the parser's stack
            return tokens, _docstrings(ast.parse(source), rows, starts)
    except PARSER_ERRORS as error:
        raise SyntaxError(f"code does not parse: {error}") from None


def _tokens(source: str, starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Each token with text as (kind, start, stop), an f-string as one; SyntaxError if too many."""
    size = depth = opened = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text, (row, column), _, line = token
        if kind == tokenize.NEWLINE:
            size = 0
        elif kind not in (tokenize.NL, tokenize.COMMENT):
            size += 1
        if kind == tokenize.STRING and "f" in text.split(text[-1], 1)[0].lower():
            size += text.count("{")  # before 3.12 a whole f-string is one token
        if kind == tokenize.ERRORTOKEN and text[0] in "'\"":  # each costs the rest of the line
            raise SyntaxError("a string never ends")
        if size * max(len(line), 10_000) > MAX_WORK:
            raise SyntaxError("a statement has too many tokens")
        if kind in LAYOUT:
            continue
        start = starts[row - 1] + column
        stop = start + len(text)  # in Python 3.12.0 and 3.12.1 the end column may count bytes
        name = tokenize.tok_name[kind]  # from Python 3.12 (3.14) an f-string (t-string) is many
        if name.endswith("STRING_START"):
            opened = opened if depth else start
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            kind, start = tokenize.STRING, opened
        if not depth:
            yield kind, start, stop


def _docstrings(tree: ast.Module, rows: list[str], starts: list[int]) -> dict[int, tuple[int, str]]:
    """{start: (stop, filler)} for the leading bare strings of every module, class and function."""

    def offset(row: int, column: int) -> int:  # ast counts UTF-8 bytes, we count characters
        return starts[row - 1] + len(rows[row - 1].encode()[:column].decode())

    docstrings = {}
    for node in ast.walk(tree):
        body = node.body if isinstance(node, (ast.Module, *BODIES)) else []
        if texts := list(takewhile(_is_bare_string, body)):
            filler = "pass" if texts == body and node is not tree else ""
            stop = offset(texts[-1].end_lineno, texts[-1].end_col_offset)
            docstrings[offset(texts[0].lineno, texts[0].col_offset)] = stop, filler
    return docstrings


def _is_bare_string(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
