"""The API-update data set and the conversation that shows one example to a language model.

    load("updates.jsonl", "train")     -> [Example, ...]     # data/README.md describes the fields
    prompt(example, tokenizer)         -> [151644, 8948, ...]  # token ids, open after "<think>"
    completion(example)                -> "\\n... </think>\\n<answer> ... </answer>"

Not here: how the rows are made (`data/build.py`), and the bundled policy (`data/policy/make.py`).
"""

import ast
import datetime
import functools
import gzip
import hashlib
import itertools
import json
import random
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = HERE / "updates.jsonl"
NEWEST = HERE / "updates_2026.jsonl"  # read where its split is asked for by name, and never else
POLICY = HERE / "policy"
# What a row is for: training; new updates of libraries that are trained on; whole libraries that
# training never sees; harder questions about updates that training does not have; updates of 2026.
SPLITS = ("train", "test_seen", "test", "test_hard", "test_2026")

# The paper's conversation (arXiv 2506.20495): roles and order are the paper's, wording is ours.
SYSTEM = (
    "You are a coding assistant. Rewrite old code for the new version of its library. "
    "Follow the update information. Think first, then answer."
)
ASK = " performed an API update in version "
TASK = (
    "Reason inside <think> </think>. "
    "Then give the final code inside <answer> </answer> in a ```python fence."
)
OPENING = "Let me solve this step by step.\n<think>"  # the assistant's turn, left open


@dataclass(frozen=True)
class Example:
    """One migration: `old_code` runs in an old release, `new_code` from `new_version` on.

    The first six fields are the paper's. The others are empty where a file does not have them.
    """

    dependency: str  # the library, as people name it
    new_version: str  # with its operator, for example "==2.0.0"
    description: str  # one sentence: what changed
    update_info: str  # the note that the model is shown
    old_code: str
    new_code: str
    id: str = ""
    kind: str = ""  # "function renamed", "keyword removed", ...: data/README.md has the list
    old_version: str = ""  # a release in which old_code runs
    split: str = ""  # one of SPLITS, or "" (the file has no splits)


PAPER_FIELDS = [f.name for f in fields(Example)][:6]


def load(path: str | Path | None = None, split: str = "train") -> list[Example]:
    """Read the rows of one split from JSON-lines files (default: the bundled `updates.jsonl`).

    Several files stand with commas between them: "a.jsonl,b.jsonl". One whose rows carry no split,
    such as the paper's own, is returned whole. Fields that `Example` does not know are ignored.
    ValueError names file, line and field of the first bad row.
    """
    path = path or (NEWEST if split == "test_2026" else DEFAULT)
    rows = [row for _, row in _read(path) if row.split in ("", split)]
    if not rows:
        raise ValueError(f"{path}: no row of split '{split}'; check the field `split` of its rows")
    return rows


def splits(path: str | Path | None = None) -> list[str]:
    """The splits that the files have, in the order of `SPLITS`; "train" where they name none."""
    found = {row.split or "train" for _, row in _read(path)}
    return [name for name in SPLITS if name in found]


def endless(path: str | Path | None, seed: int, drawn: int = 0) -> Iterator[Example]:
    """The training split again and again, shuffled anew each time; goes on after `drawn` rows."""
    rows, rng = load(path, "train"), random.Random(seed)
    epochs = (rng.sample(rows, len(rows)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), drawn, None)


def where(path: str | Path | None, example: Example) -> str:
    """Where an example stands, for a complaint about it: "FILE, line 7"."""
    return next(place for place, row in _read(path) if row == example)


def fingerprint(path: str | Path | None) -> str:
    """The same for the same rows: a run that goes on must find the data that it began with."""
    return hashlib.sha256(repr([row for _, row in _read(path)]).encode()).hexdigest()


def digest(example: Example) -> str:
    """A short name of a row, by all that it says: rows may have no id, or share one."""
    return hashlib.sha256(repr(example).encode()).hexdigest()[:12]


def json_lines(path: str | Path, partial: bool = False) -> Iterator[tuple[str, dict]]:
    """("FILE, line 7", object) for each line that is not blank, of any JSON-lines file we read.

    With a byte order mark or without, gzip or not. `partial` leaves out a last line that has no
    end: a stopped run wrote half of it. ValueError names file and line of what is no object.
    """
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    # Split on "\n" alone: str.splitlines would also cut at form feeds and U+2028 inside a string.
    lines = raw.split(b"\n")
    for number, line in enumerate(lines[:-1] if partial else lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip(b" \t\r\xef\xbb\xbf"):  # a byte order mark alone is blank, too
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
            raise ValueError(f"{where}: not a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object but a {type(row).__name__}")
        yield where, row


def _read(path: str | Path | None) -> list[tuple[str, Example]]:
    """The rows of the files that `--data` names, each with its place: "FILE, line 7"."""
    path, found = path or DEFAULT, {}
    for file in [path] if isinstance(path, Path) else map(Path, path.split(",")):
        if not file.is_file():
            raise ValueError(f"{file}: no such data file; give a JSON-lines file with --data")
        found[file] = _rows(file, file.stat().st_mtime_ns)
    for file, rows in found.items():
        if len(found) > 1 and rows and not rows[0][1].split:
            raise ValueError(f"{file}: its rows need the field 'split' to be read with other files")
    return [pair for rows in found.values() for pair in rows]


@functools.lru_cache(maxsize=8)  # a run asks for several splits of few files
def _rows(path: Path, _changed: int) -> list[tuple[str, Example]]:
    rows = [(where, _example(row, where)) for where, row in json_lines(path)]
    for where, row in rows if any(row.split for _, row in rows) else ():
        if row.split not in SPLITS:
            raise ValueError(
                f"{where}: field 'split' is '{row.split}': "
                f"give one of {', '.join(SPLITS)} in every row, or leave it out in all"
            )
    return rows


def _example(row: dict, where: str) -> Example:
    """Check one row; every complaint starts with `where`."""
    known = {f.name for f in fields(Example)}
    for name in PAPER_FIELDS + sorted(known & row.keys()):
        if name not in row:
            raise ValueError(f"{where}: field '{name}' is missing")
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: field '{name}' must be a string")
        if not row[name].isascii() and re.search("[\ud800-\udfff]", row[name]):
            raise ValueError(f"{where}: field '{name}' has half a character (a lone surrogate)")
        if name in PAPER_FIELDS and not row[name].strip():
            raise ValueError(f"{where}: field '{name}' is empty")
    for name in ("old_code", "new_code"):
        try:
            parsed(row[name])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{where}: field '{name}' is not valid Python ({error})") from None
    return Example(**{name: value for name, value in row.items() if name in known})


_ONE = threading.Lock()  # the filters of warnings belong to all threads


def parsed(code: str) -> ast.Module:
    """The tree of a foreign program, without the warnings that Python has about it (`"\\d"`)."""
    with _ONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def version(example: Example) -> str:
    """The new version without its operator: "==2.0.0", ">=2.0.0" and "2.0.0" all give "2.0.0"."""
    return re.sub(r"^[\s<>=!~]+", "", example.new_version).strip()


def messages(example: Example) -> list[dict[str, str]]:
    """The system and user turns of the paper's conversation."""
    user = (
        f"{example.dependency}{ASK}{version(example)}\n<doc>\n{example.update_info.strip()}\n</doc>\n"
        f"```python\n{example.old_code.strip(chr(10))}\n```\n{TASK}"
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def prompt(example: Example, tokenizer) -> list[int]:
    """Token ids of the conversation in the model's own chat template, open after `<think>`."""
    return opened(messages(example), tokenizer)


def opened(turns: list[dict[str, str]], tokenizer, opening: str = OPENING) -> list[int]:
    """Token ids of these turns in the model's own chat template, and of the answer's opening."""
    turns = [turn | {"content": _marked(turn["content"], tokenizer)} for turn in turns]
    text = rendered(turns, tokenizer, add_generation_prompt=True)
    if opening:  # some templates begin a thought, too
        text = re.sub(r"<think>\s*(</think>\s*)?$", "", text)
    # The template has written its own special tokens: none may be added a second time.
    return _ids(text + opening, tokenizer)


# A template that writes the date is told this one: a prompt is the same tomorrow, in a run that
# goes on and in whatever asks its policy later.
TODAY = datetime.date(2025, 6, 25)
DATE = "{% macro strftime_now(format) %}{{ format"
for _code in ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdDeFHIjmMpSTuyY%")):
    DATE += f".replace('{_code}', '{TODAY.strftime(_code)}')"
DATE += " }}{% endmacro +%}"


def rendered(turns: list[dict[str, str]], tokenizer, **how) -> str:
    """These turns as the model's own chat template writes them."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; take an instruct model")
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = DATE + template
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how)
    except Exception as error:  # a template is a foreign program: it may raise whatever it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer's chat template refuses the prompt: {reason}") from None


def encoded(text: str, tokenizer) -> list[int]:
    """Token ids of a text; what spells a control token in it, such as "<|im_end|>", stays text."""
    return _ids(_marked(text, tokenizer), tokenizer)


MARK = "\ud800"  # half a character: no text that a tokenizer takes has one


def _marked(text: str, tokenizer) -> str:
    """The text with a MARK on either side of all that spells a control token."""
    return re.sub(_controls(tokenizer, len(tokenizer)), f"{MARK}\\g<0>{MARK}", text)


@functools.lru_cache(maxsize=4)
def _controls(tokenizer, _size: int) -> re.Pattern:
    """Matches what the tokenizer marks special, but for the tags that we write ourselves."""
    nobody = Example("", "", "", "", "", "")
    ours = str(messages(nobody)) + OPENING + completion(nobody)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted((special | set(tokenizer.all_special_tokens)) - {""}, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names if name not in ours) or "(?!)")


def _ids(text: str, tokenizer) -> list[int]:
    """Token ids of a text; what stands between two MARKs loses the meaning of a special token."""
    first, *parts = text.split(MARK)
    ids = tokenizer.encode(first, add_special_tokens=False)
    # Behind a line's end, since some tokenizers write a blank before the first word of a text.
    start = tokenizer.encode("\n", add_special_tokens=False)
    for i, part in enumerate(parts):
        plain = dict(add_special_tokens=False, split_special_tokens=i % 2 == 0)
        behind = tokenizer.encode("\n" + part, **plain)
        whole = behind[: len(start)] == start
        ids += behind[len(start) :] if whole else tokenizer.encode(part, **plain)
    return ids


def answer(thought: str, code: str) -> str:
    """The text that follows the prompt: the end of the thought, then the code."""
    code = code.strip("\n")
    return f"\n{thought.strip()}\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


def completion(example: Example) -> str:
    """The answer that supervised fine-tuning imitates: the description is the thought."""
    return answer(example.description, example.new_code)
