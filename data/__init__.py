"""The API-update data set and the conversation that shows one example to a language model.

    load("updates.jsonl", "train")     -> [Example, ...]     # data/README.md describes the fields
    prompt(example, tokenizer)         -> [151644, 8948, ...]  # token ids, open after "<think>"
    completion(example)                -> "\\n... </think>\\n<answer> ... </answer>"

Not here: how the rows are made (`data/build.py`), and the bundled policy (`data/policy/make.py`).
"""

import ast
import functools
import hashlib
import json
import re
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
    rows = [row for row in _read(path) if row.split in ("", split)]
    if not rows:
        raise ValueError(f"{path}: no row of split '{split}'; check the field `split` of its rows")
    return rows


def splits(path: str | Path | None = None) -> list[str]:
    """The splits that the files have, in the order of `SPLITS`; "train" where they name none."""
    found = {row.split or "train" for row in _read(path)}
    return [name for name in SPLITS if name in found]


def where(path: str | Path | None, example: Example) -> str:
    """Where an example stands, for a complaint about it: "FILE, line 7"."""
    found = ((file, n) for file in _files(path) for n, row in _rows(file).items() if row == example)
    return "{}, line {}".format(*next(found))


def fingerprint(path: str | Path | None) -> str:
    """The same for the same rows: a run that goes on must find the data that it began with."""
    return hashlib.sha256(repr(_read(path)).encode()).hexdigest()


def _read(path: str | Path | None) -> list[Example]:
    found = {file: list(_rows(file).values()) for file in _files(path)}
    bare = [file for file, rows in found.items() if rows and not rows[0].split]
    if bare and len(found) > 1:
        raise ValueError(f"{bare[0]}: its rows need the field 'split' to be read with other files")
    return [row for rows in found.values() for row in rows]


def _files(path: str | Path | None) -> list[Path]:
    """The files that `--data` names."""
    if isinstance(path, Path):
        return [path]
    return list(map(Path, path.split(","))) if path else [DEFAULT]


def _rows(path: Path) -> dict[int, Example]:
    """Each row by its line number."""
    if not path.is_file():
        raise ValueError(f"{path}: no such data file; give a JSON-lines file with --data")
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # a run asks for several splits of few files
def _parsed(path: Path, _changed: int) -> dict[int, Example]:
    # Split on "\n" alone: str.splitlines would also cut at form feeds and U+2028 inside a string.
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    rows = {n: _example(line, f"{path}, line {n}") for n, line in lines if line.strip()}
    marked = any(row.split for row in rows.values())
    for n, row in rows.items():
        if marked and row.split not in SPLITS:
            raise ValueError(
                f"{path}, line {n}: field 'split' is '{row.split}': "
                f"give one of {', '.join(SPLITS)} in every row, or leave it out in all"
            )
    return rows


def _example(line: bytes, where: str) -> Example:
    """Parse and check one line; every complaint starts with `where`."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{where}: not a JSON object ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object but a {type(row).__name__}")
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
            ast.parse(row[name])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{where}: field '{name}' is not valid Python ({error})") from None
    return Example(**{name: value for name, value in row.items() if name in known})


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


def opened(turns: list[dict[str, str]], tokenizer) -> list[int]:
    """Token ids of these turns in the model's own chat template, and of the answer's opening."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; take an instruct model")
    from jinja2 import TemplateError  # here, so that the builder runs without it

    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the prompt: {error}") from None
    # The template has written its own special tokens: none may be added a second time.
    return tokenizer.encode(text + OPENING, add_special_tokens=False)


def answer(thought: str, code: str) -> str:
    """The text that follows the prompt: the end of the thought, then the code."""
    return (
        f"\n{thought.strip()}\n</think>\n<answer>\n```python\n{code.strip(chr(10))}\n```\n</answer>"
    )


def completion(example: Example) -> str:
    """The answer that supervised fine-tuning imitates: the description is the thought."""
    return answer(example.description, example.new_code)
