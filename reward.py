"""Rule-based rewards of ReCode (arXiv 2506.20495): format, EM*, ES*, and a batched edit distance.

    total = format (+1 / -1) + correctness, in [-3, 3]
    EM*   = 2 equal to the target | -1.5 parses but differs | -2 no code, or it does not parse
    ES*   = 3.5 * ES - 1.5, ES = 1 - distance / max(len)    | -2 no code, or it does not parse
    EM_copy = 2 equal to the target | 0 parses but differs  | -2 the old code again, or no code

EM* and ES* are the paper's, and pay a copy of the old code like any other wrong answer, or better:
where its samples are worse than a copy, a lazy model learns to copy. EM_copy is ours.
All compare characters after comments, docstrings and blank lines are gone. Where we differ from
the release: it cut comments out with regular expressions, which ate code between two apostrophes
and strings with `#`; it scored fences inside <think>; it computed distances one by one in Python.
Nothing here runs the code.
"""

import ast
import io
import os.path
import re
import tokenize
import warnings
from collections.abc import Iterator
from itertools import accumulate, takewhile

import torch
from torch import FloatTensor, LongTensor, Tensor

Pair = tuple[str, str]
PYTHON = ("", "python", "py")  # what may stand behind the ``` that opens a fence of code
Device = str | torch.device

# ---- rewards ------------------------------------------------------------------------------------


def score(
    completions: list[str],
    targets: list[str],
    correctness: str = "es_star",
    device: Device = "cpu",
    old_codes: list[str] | None = None,
) -> dict[str, FloatTensor]:
    """{"format", "correctness", "exact", "total"}: each float32 [N] on `device`.

    `correctness` is "es_star", "em_star" or, with `old_codes`, "em_copy", anything else a
    ValueError; `exact` is 1.0 where the stripped code equals the target's, else 0.0; total = format
    + correctness. With `old_codes` there is `copied` too: 1.0 where it equals the old code.
    """
    if correctness not in ("em_star", "es_star", "em_copy"):
        raise ValueError(f"correctness must be em_star, es_star or em_copy, got {correctness!r}")
    if correctness == "em_copy" and old_codes is None:
        raise ValueError("correctness em_copy compares with the old code: give old_codes")
    pairs = _strip_all(completions, targets)
    layout = torch.tensor([format_reward(text) for text in completions], device=device).float()
    right = em = _em_star(pairs, device)
    extra = {}
    if old_codes is not None:
        olds = _stripped(old_codes, "old code")
        copied = [code == old for (code, _), old in zip(pairs, olds, strict=True)]
        extra["copied"] = torch.tensor(copied, device=device).float()
    if correctness == "es_star":
        right = _es_star(pairs, device)
    elif correctness == "em_copy":
        right = torch.where(em == -1.5, -2.0 * extra["copied"], em)
    exact = (em == 2.0).float()
    return {"format": layout, "correctness": right, "exact": exact, "total": layout + right} | extra


def es_star(completions: list[str], targets: list[str], device: Device = "cpu") -> FloatTensor:
    """ES*, list[N], list[N] -> float32 [N] on `device`. Targets are bare code, without a fence.

    Raises ValueError if the lists differ in length or a target does not parse: that is the data's
    fault. No completion raises.
    """
    return _es_star(_strip_all(completions, targets), device)


def em_star(completions: list[str], targets: list[str]) -> FloatTensor:
    """EM*, list[N], list[N] -> float32 [N] on the CPU; raises like `es_star`."""
    return _em_star(_strip_all(completions, targets), "cpu")


def _strip_all(completions: list[str], targets: list[str]) -> list[tuple[str | None, str]]:
    """(stripped code or None, stripped target) for each row; each distinct text is parsed once."""
    if len(completions) != len(targets):
        raise ValueError(f"got {len(completions)} completions for {len(targets)} targets")
    goals = _stripped(targets, "target")
    code = {completion: _stripped_code(completion) for completion in set(completions)}
    return [(code[c], goal) for c, goal in zip(completions, goals, strict=True)]


def _stripped(programs: list[str], what: str) -> list[str]:
    """Each program of the data without comments; each distinct one is parsed once."""
    known = {}
    for program in set(programs):
        try:
            known[program] = strip_comments(program)
        except SyntaxError as error:
            raise ValueError(f"{what} is no valid Python ({error}): {program[:500]!r}") from None
    return [known[program] for program in programs]


MAX_TEXT = 2**17  # characters: a longer completion scores -2 unread, for a megabyte takes seconds


def _stripped_code(completion: str) -> str | None:
    code = extract_code(completion) if len(completion) <= MAX_TEXT else None
    try:
        return None if code is None else strip_comments(code)
    except SyntaxError:
        return None


def _es_star(pairs: list[tuple[str | None, str]], device: Device) -> FloatTensor:
    parsed = [pair for pair in pairs if pair[0] is not None]
    distance = levenshtein([c for c, _ in parsed], [t for _, t in parsed], device).tolist()
    # max(1, ...): two empty sides have distance 0, and ES = 1 - 0 / 1.
    similarity = (1 - d / max(1, *map(len, p)) for d, p in zip(distance, parsed, strict=True))
    values = [-2.0 if code is None else 3.5 * next(similarity) - 1.5 for code, _ in pairs]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _em_star(pairs: list[tuple[str | None, str]], device: Device) -> FloatTensor:
    values = [-2.0 if code is None else 2.0 if code == goal else -1.5 for code, goal in pairs]
    return torch.tensor(values, dtype=torch.float32, device=device)


# ---- format: one think block, one answer block, one fence -------------------------------------


def format_reward(completion: str) -> float:
    """+1.0 if "<think>" + completion is one think block, then one answer block, else -1.0.

    Only white space may stand between and after. A tag that code quotes counts as a tag.
    """
    text = "<think>" + completion  # the prompt ends with the opening tag
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return -1.0
    # Each tag stands once and <think> comes first, so the order of the other three is all that is
    # left. No regular expression: nothing can backtrack over a megabyte of almost-tags.
    rest = text.partition("</think>")[2].strip()
    return 1.0 if rest.startswith("<answer>") and rest.endswith("</answer>") else -1.0


def extract_code(completion: str) -> str | None:
    """The one fenced block of the one answer block after </think>; None if there is no such thing.

    What stands before </think> never counts, without </think> nothing has been answered, and with
    another think block around or before the answer neither. A line ``` closes the fence wherever
    it stands, in a string of the code too. The code comes back with LF line ends and without its
    last one.
    """
    rest = completion.partition("</think>")[2]
    before, _, after = rest.partition("<answer>")
    answer, closed, after = after.partition("</answer>")
    if not closed or any(tag in before + after for tag in ("<answer>", "</answer>")):
        return None
    if "<answer>" in answer or "<think>" in before or "</think>" in after:  # nested
        return None
    blocks = _fenced_blocks(answer)
    if len(blocks) != 1 or blocks[0] is None or blocks[0][0] not in PYTHON:
        return None
    return blocks[0][1]


def any_code(completion: str) -> str | None:
    """The code of an answer in whatever form; None if there is none. For reports, never training.

    The code in the asked form, if there is one. Else, of what stands after the last </think> (of
    everything, where nothing does) without answer tags: the last fence of Python, if no fence is
    left open (the answer was cut off); where there is no fence at all, the whole text, if it parses
    and imports, calls, defines or assigns something: a word of prose that parses is no code.
    """
    if len(completion) > MAX_TEXT:
        return None
    code = extract_code(completion)
    if code is not None:
        return code
    thought, _, rest = re.sub("</?answer>", "\n", completion).rpartition("</think>")
    text = rest if rest.strip() else thought
    blocks = _fenced_blocks(text)
    if blocks:
        fences = [code for language, code in blocks if language in PYTHON] if blocks[-1] else []
        return fences[-1] if fences else None
    return text.strip("\n") if _does_something(text) else None


def _does_something(text: str) -> bool:
    try:
        program = strip_comments(text)  # first: it guards the parser
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return any(isinstance(node, DEEDS) for node in ast.walk(ast.parse(program)))
    except PARSER_ERRORS:
        return False


DEEDS = (ast.Import, ast.ImportFrom, ast.Call, ast.Assign, ast.AugAssign)
DEEDS += (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def same(code: str | None, program: str) -> bool:
    """Whether `code` is this program, comments, docstrings and blank lines aside."""
    try:
        return code is not None and strip_comments(code) == strip_comments(program)
    except SyntaxError:
        return False


def _fenced_blocks(text: str) -> list[Pair | None]:
    """Every (language, code) between fences in column 0; a last None is a fence that never ends."""
    blocks: list[Pair | None] = []
    language, code = None, []
    for line in text.replace("\r\n", "\n").split("\n"):
        fence = line.rstrip()
        if language is None and fence.startswith("```") and "`" not in fence[3:]:
            language, code = fence[3:].lower(), []  # any language opens: its end is no start
        elif language is not None and fence == "```":
            blocks.append((language, "\n".join(code)))
            language = None
        else:
            code.append(line)
    return blocks if language is None else [*blocks, None]


# ---- stripping: comments, docstrings, blank lines, trailing blanks ----------------------------

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
# From Python 3.12 (3.14) an f-string (t-string) comes as many tokens between a start and an end.
STARTS = [getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START")]
ENDS = [getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END")]


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


def _parse(source: str) -> tuple[list[tuple[int, int, int]], dict[int, Pair]]:
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
        if kind in STARTS:
            opened = opened if depth else start
            depth += 1
        elif kind in ENDS:
            depth -= 1
            kind, start = tokenize.STRING, opened
        if not depth:
            yield kind, start, stop


def _docstrings(tree: ast.Module, rows: list[str], starts: list[int]) -> dict[int, Pair]:
    """{start: (stop, filler)} for the leading bare strings of every module, class and function."""

    def offset(row: int, column: int) -> int:  # ast counts UTF-8 bytes, we count characters
        return starts[row - 1] + len(rows[row - 1].encode()[:column].decode())

    docstrings = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts = list(takewhile(_is_bare_string, node.body))
            if texts:
                empty = len(texts) == len(node.body) and not isinstance(node, ast.Module)
                stop = offset(texts[-1].end_lineno, texts[-1].end_col_offset)
                docstrings[offset(texts[0].lineno, texts[0].col_offset)] = stop, "pass" * empty
    return docstrings


def _is_bare_string(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


# ---- Levenshtein distance, bit-parallel and batched -------------------------------------------

WORD = 64  # rows of the distance table in one int64
PAD = -1  # no code point
MAX_CELLS = 2**31  # pairs * longest * longest short side in one batch: at most 256 MB of words


def levenshtein(a: list[str], b: list[str], device: Device = "cpu") -> LongTensor:
    """Exact edit distance of a[i] and b[i] in code points: list[N], list[N] -> int64 [N].

    Equal pairs cost nothing, repeated ones are computed once, and common ends are cut off first:
    no cheapest edit touches them. Raises ValueError if the lists differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"levenshtein needs two lists of one length, got {len(a)} and {len(b)}")
    core = {pair: _core(*pair) for pair in set(zip(a, b, strict=True))}
    # A side that is empty now leaves one insertion for each character of the other.
    distance = {(short, long): len(long) for short, long in core.values() if not short}
    for batch in _batches(set(core.values()) - set(distance)):
        distance.update(zip(batch, _myers(batch, device).tolist(), strict=True))
    values = [distance[core[pair]] for pair in zip(a, b, strict=True)]
    return torch.tensor(values, dtype=torch.long, device=device)


def _core(a: str, b: str) -> Pair:
    """Both without their common beginning and end, the shorter first."""
    if a == b:
        return "", ""
    head = len(os.path.commonprefix([a, b]))
    a, b = a[head:], b[head:]
    tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    return (a, b) if len(a) <= len(b) else (b, a)


def _batches(pairs: set[Pair]) -> Iterator[list[Pair]]:
    """Pairs of like size together, so that padding and memory stay bounded."""
    batch, width = [], 0
    for short, long in sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0]), pair)):
        width = max(width, len(short))
        if batch and (len(batch) + 1) * len(long) * width > MAX_CELLS:
            yield batch
            batch, width = [], len(short)
        batch.append((short, long))
    if batch:
        yield batch


@torch.inference_mode()
def _myers(pairs: list[Pair], device: Device) -> LongTensor:
    """Distances of N (short, long) pairs by Myers' bit vectors (1999), in Hyyro's form (2003).

    Neighbours in the distance table D differ by -1, 0 or 1. The long side runs down the table, 64
    rows to a word; `up` and `down` hold the rows with D[i, j] - D[i-1, j] = 1 and -1. A column of
    a word needs the horizontal step that leaves the word above, so word w does column t - w at
    step t: all words of all pairs in one go, n + W - 1 steps, and the shorter side is the loop.

    Measured for 64 pairs of 1000 random characters, CPU seconds on one thread of a busy machine:
    this 0.06, anti-diagonals of the table about 0.10, its rows with torch.cummax 0.12, plain Python
    19 or more; for 256 pairs this 0.14, rows 0.52. Diagonals would need a million steps for 1 MB of
    text, and the wide tensors of the other two wait for their threads where cores are shared.
    """
    words = -(-max(len(long) for _, long in pairs) // WORD)  # W
    text = _codes([short for short, _ in pairs], max(len(short) for short, _ in pairs), device)
    pattern = _codes([long for _, long in pairs], words * WORD, device)  # [N, 64 W]
    columns = text.shape[1]  # n
    table, slot = _match_table(pattern, text)  # [W, N, A], [N, n]
    slot = slot.t().flip(0).contiguous()  # [n, N], last column first: word w + 1 is a column behind
    place = torch.arange(words * len(pairs), device=device).view(words, -1)  # [W, N]
    place *= table.shape[2]  # of each word's first slot in the table

    # Padding stands left and up. It equals itself and adds nothing, so D there is what an empty
    # string gives: 1 per real row downwards, 1 per real column to the right.
    real = (text != PAD).long().t()  # [n, N]
    up = _pack(pattern != PAD)  # [W, N]
    down = torch.zeros_like(up)
    plus = up.new_zeros(words + 1, len(pairs))  # horizontal steps of +1 that enter word w, of -1:
    minus = torch.zeros_like(plus)  # the first row is the table's upper edge
    for t in range(columns + words - 1):
        first, last = max(0, t - columns + 1), min(words, t + 1)  # the words at work
        now, below, ahead = slice(first, last), slice(first + 1, last + 1), columns - 1 - t
        if t < columns:
            plus[0] = real[t]
        match = table.take(place[now] + slot[ahead + first : ahead + last])
        right, left = _column(match, up[now], down[now], plus[now], minus[now])
        plus[below], minus[below] = right < 0, left < 0  # the sign bit is a word's last row
    # D at the lower right = the way along the upper edge, then down the last column.
    return real.sum(0) + _count(up) - _count(down)


def _column(
    match: Tensor, up: Tensor, down: Tensor, plus: Tensor, minus: Tensor
) -> tuple[Tensor, Tensor]:
    """Move `up` and `down` (in place) one column on; all int64 [words at work, N].

    same  = (((match & up) + up) ^ up) | match | down   rows with D[i, j] == D[i-1, j-1]
    right = down | ~(same | up), left = same & up       rows with a horizontal step of 1 and -1
    and then, with both a row lower and the step from above let in,
    up    = left | ~(same | right), down = same & right
    """
    match |= minus
    same = (match & up).add_(up).bitwise_xor_(up).bitwise_or_(match).bitwise_or_(down)
    right, left = (same | up).bitwise_not_().bitwise_or_(down), same & up
    lower_right, lower_left = (right << 1).bitwise_or_(plus), (left << 1).bitwise_or_(minus)
    torch.bitwise_or(lower_left, (same | lower_right).bitwise_not_(), out=up)
    torch.bitwise_and(same, lower_right, out=down)
    return right, left


def _codes(texts: list[str], width: int, device: Device) -> Tensor:
    """Code points, right-aligned, PAD on the left: list[N] -> int32 [N, width]."""
    flat = bytearray("".join(texts).encode("utf-32-le", "surrogatepass"))
    length = torch.tensor([len(text) for text in texts])
    real = torch.arange(width) >= width - length[:, None]  # [N, width]
    codes = torch.full(real.shape, PAD, dtype=torch.int32)
    return codes.masked_scatter_(real, torch.frombuffer(flat, dtype=torch.int32)).to(device)


def _match_table(pattern: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Where each character of the text stands in the pattern: [N, 64 W], [N, n] -> two tensors.

    `table` [W, N, A]: bit i of table[w, k, c] is set where pattern k has character c at 64 w + i.
    `slot` [N, n]: the c of each character of the text, counted from 0 in each pair, so that a
    large alphabet in one completion costs the others nothing.
    """
    order = text.sort(dim=1).values  # [N, n]
    rank = (order.diff(dim=1, prepend=order[:, :1]) != 0).cumsum(1)  # [N, n], 0 to A - 1
    nearest = torch.searchsorted(order, pattern).clamp_(max=order.shape[1] - 1)  # [N, 64 W]
    known = order.gather(1, nearest) == pattern
    bits = known.long() << torch.arange(WORD, device=text.device).repeat(pattern.shape[1] // WORD)
    by_word = (len(text), -1, WORD)
    bits, place = (x.view(by_word).transpose(0, 1) for x in (bits, rank.gather(1, nearest)))
    table = bits.new_zeros(len(bits), len(text), int(rank.max()) + 1)
    # Each bit is added once, so the sum is their union.
    return table.scatter_add_(2, place, bits), rank.gather(1, torch.searchsorted(order, text))


def _pack(rows: Tensor) -> Tensor:
    """bool [N, 64 W] -> int64 words [W, N], the first row in the lowest bit."""
    words = rows.long().view(len(rows), -1, WORD) << torch.arange(WORD, device=rows.device)
    return words.sum(2).t().contiguous()


def _count(words: Tensor) -> Tensor:
    """Number of set bits in each column of words: [W, N] -> [N]."""
    return sum((words >> bit & 1).sum(0) for bit in range(WORD))
