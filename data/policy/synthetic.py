"""Endless made-up API updates that look like real code: the text the bundled policy learns from.

A sample starts from a real program of the training split (never a held-out library), mixes in
statements of others or of a small random grammar, applies the pair's own update or a made-up one,
and then gives every identifier, string and number a random new name, the same in code and note:

    base program -> edit (real or made up, with its note) -> rename everything -> Sample
    (programs.py)   (edits.py)                               (programs.py)

So a model cannot learn one library by heart: all it can learn is to read the note and obey it.
"""

import difflib
import keyword
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data import Example
from data.policy.edits import Rename, renames, update
from data.policy.notes import dress, quoted
from data.policy.programs import (
    KEEP,
    WHOLE,
    WORD,
    Grammar,
    Pieces,
    Renamer,
    parses,
    program,
    random_word,
    spans,
    vocabulary,
)

LONGEST_THOUGHT = 320  # characters


@dataclass(frozen=True)
class Sample:
    """One made-up migration with the short thought that leads from the old to the new code."""

    library: str
    version: str
    note: str
    old: str
    new: str
    thought: str


# ---------------------------------------------------------------- thoughts


@dataclass
class Change:
    """Words old[old_begin:old_end] become new[new_begin:new_end], both to the end of the line."""

    old_begin: int
    old_end: int
    new_begin: int
    new_end: int
    swap: bool  # it begins with words that others replace, not with words added or dropped


def thought(old: str, new: str, note: str) -> str:
    """What changes, line by line: "Replace `product(a) / n` by `prod(a) / n`."

    A patch begins at the word that another replaces, if the note shows it, else at the nearest name
    before the change that the note shows, and goes to the end of the line. So thought and answer
    are written by copying forwards, from the note, from the old code or from the thought itself:
    small models do not learn to step back to where a line began, and where a shorter patch ends
    they can only guess.
    """
    olds, news = WHOLE.findall(old), WHOLE.findall(new)
    shown = quoted(note) - set(keyword.kwlist)
    patches: list[tuple[int, Change]] = []  # (where it begins, what it changes)
    for change in changed_lines(olds, news):
        begin = patch_begin(olds, change, shown)
        if patches and begin < patches[-1][1].old_end:  # it would show code that is gone
            begin, last = patches.pop()
            change = replace(change, old_begin=last.old_begin, new_begin=last.new_begin)
        patches.append((begin, change))
    return " ".join(patch(olds, news, begin, change) for begin, change in patches)


def patch(old: list[str], new: list[str], begin: int, change: Change) -> str:
    """The patch of `change` in words, from old[begin] on."""
    before = "".join(old[begin : change.old_end])
    after = "".join(old[begin : change.old_begin] + new[change.new_begin : change.new_end])
    return f"Replace `{before}` by `{after}`."


def changed_lines(old: list[str], new: list[str]) -> list[Change]:
    """The changes from `old` to `new`; those of one line are one."""
    found: list[Change] = []
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    for what, old_begin, old_end, new_begin, new_end in opcodes:
        if what == "equal":
            continue
        line_end = next((i for i in range(old_end, len(old)) if "\n" in old[i]), len(old))
        new_line_end = new_end + line_end - old_end
        if found and old_begin <= found[-1].old_end:  # on the line of the last change
            found[-1].old_end, found[-1].new_end = line_end, new_line_end
        else:
            swap = what == "replace"
            found.append(Change(old_begin, line_end, new_begin, new_line_end, swap))
    return found


def patch_begin(old: list[str], change: Change, shown: set[str]) -> int:
    """The index in `old` at which the patch of `change` begins; `shown` are the note's names."""
    begin = change.old_begin
    if change.swap and old[begin] in shown:
        return begin
    words = [i for i in range(begin) if WORD.fullmatch(old[i])]
    on_line = [i for i in words if not any("\n" in word for word in old[i:begin])]
    names = [i for i in on_line if old[i] in shown]
    if names:
        return names[-1]
    if begin < change.old_end and WORD.fullmatch(old[begin]):
        return begin
    return (on_line or words or [begin])[-1]


# ---------------------------------------------------------------- the stream


@dataclass(frozen=True)
class Corpus:
    """What samples are made of: rows of the training split, and their parts."""

    size: int  # about the longest program, in characters
    examples: list[Example]
    short: list[Example]  # those of at most that size
    codes: list[Pieces]  # the statements of each program
    borrowed: list[Rename]
    words: list[str]  # the parts of all identifiers


def stream(
    examples: list[Example], seed: int, real: float = 0.25, size: int = 450
) -> Iterator[Sample]:
    """Samples without end. `real` is the share with the pair's own update and note.

    Programs have at most about `size` characters.
    """
    rng = random.Random(seed)
    short = [e for e in examples if len(e.old_code) <= size]
    codes = [spans(code) for e in examples for code in (e.old_code, e.new_code)]
    corpus = Corpus(size, examples, short, codes, renames(examples), vocabulary(examples))
    while True:
        renamer = Renamer(rng, corpus.words)
        drawn = (random_word(rng, corpus.words) for _ in range(40))
        grammar = Grammar(rng, [word for word in drawn if word not in KEEP])
        library = rng.choice([rng.choice(examples).dependency, grammar.name()])
        pair = real_pair if rng.random() < real and short else made_up_pair
        told = pair(corpus, grammar)
        if told is None:
            continue
        old, new, note = renamer.code(told[0]), renamer.code(told[1]), renamer.note(told[2])
        words = thought(old, new, note)
        fits = len(old) <= 1.3 * size and len(words) <= LONGEST_THOUGHT
        if old != new and fits and parses(old) and parses(new):
            version = ".".join(str(rng.randint(0, 30)) for _ in range(rng.choice([2, 3])))
            yield Sample(library, version, note, old, new, words)


def real_pair(corpus: Corpus, grammar: Grammar) -> tuple[str, str, str]:
    """(old code, new code, note) of a row, sometimes with one more statement on both sides."""
    rng = grammar.rng
    row = rng.choice(corpus.short)
    old, new = row.old_code, row.new_code
    if rng.random() < 0.3:
        if rng.random() < 0.5:
            extra = grammar.statement()
        else:
            extra = rng.choice(rng.choice(corpus.codes)[1] or ["pass"])
        old, new = (f"{code.rstrip()}\n{extra}\n" for code in (old, new))
    return old, new, row.update_info


def made_up_pair(corpus: Corpus, grammar: Grammar) -> tuple[str, str, str] | None:
    """(old code, new code, note) of a made-up update; None where it leads nowhere."""
    rng, size = grammar.rng, corpus.size
    longest = rng.choice([size // 4, size // 2, size * 3 // 4, size])
    old = program(rng, corpus.codes, grammar, longest)
    edit = update(old, grammar, corpus.borrowed) if parses(old) else None
    if edit is None:
        return None
    new, note = edit
    return old, new, dress(note, grammar)
