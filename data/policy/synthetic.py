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
from dataclasses import dataclass

from data import Example
from data.policy.edits import renames, update
from data.policy.notes import dress, quoted
from data.policy.programs import (
    KEEP,
    WHOLE,
    WORD,
    Grammar,
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


def thought(old: str, new: str, note: str) -> str:
    """What changes, line by line: "Replace `product(a) / n` by `prod(a) / n`."

    A patch begins at the word that another replaces, if the note shows it, else at the nearest name
    before the change that the note shows, and goes to the end of the line. So thought and answer
    are written by copying forwards, from the note, from the old code or from the thought itself:
    small models do not learn to step back to where a line began, and where a shorter patch ends
    they can only guess.
    """
    a, b = WHOLE.findall(old), WHOLE.findall(new)
    shown = quoted(note) - set(keyword.kwlist)
    said = []
    for i, j, k, m, swap in changed_lines(a, b):
        begin = i
        if not (swap and a[i] in shown):
            words = [n for n in range(i) if WORD.fullmatch(a[n])]
            here = [n for n in words if not any("\n" in word for word in a[n:i])]
            names = [n for n in here if a[n] in shown]
            if names:
                begin = names[-1]
            elif i == j or not WORD.fullmatch(a[i]):
                begin = (here or words or [i])[-1]
        before, after = "".join(a[begin:j]), "".join(a[begin:i] + b[k:m])
        said.append(f"Replace `{before}` by `{after}`.")
    return " ".join(said)


def changed_lines(a: list[str], b: list[str]) -> list[list[int]]:
    """[i, j, k, m, swap] for each change: a[i:j] becomes b[k:m], both to the end of the line.

    `swap` is true where it begins with words that others replace, not with words added or dropped.
    """
    found: list[list[int]] = []
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    for op, i, j, k, m in (opcode for opcode in opcodes if opcode[0] != "equal"):
        end = next((n for n in range(j, len(a)) if "\n" in a[n]), len(a))
        if found and i <= found[-1][1]:  # on the line of the last change
            found[-1][1:4:2] = end, m + end - j
        else:
            found.append([i, end, k, m + end - j, op == "replace"])
    return found


# ---------------------------------------------------------------- the stream


def stream(
    examples: list[Example],
    seed: int,
    real: float = 0.25,
    size: int = 450,
) -> Iterator[Sample]:
    """Samples without end. `real` is the share with the pair's own update and note.

    Programs have at most about `size` characters.
    """
    rng = random.Random(seed)
    words = vocabulary(examples)
    codes = [spans(c) for e in examples for c in (e.old_code, e.new_code)]
    short = [e for e in examples if len(e.old_code) <= size]
    borrowed = renames(examples)
    while True:
        renamer = Renamer(rng, words)
        drawn = (random_word(rng, words) for _ in range(40))
        g = Grammar(rng, [word for word in drawn if word not in KEEP])
        library = rng.choice([rng.choice(examples).dependency, g.name()])
        if rng.random() < real and short:
            e = rng.choice(short)
            old, new, note = e.old_code, e.new_code, e.update_info
            if rng.random() < 0.3:  # more code around the same update
                extra = (
                    g.statement()
                    if rng.random() < 0.5
                    else rng.choice(rng.choice(codes)[1] or ["pass"])
                )
                old, new = old.rstrip() + "\n" + extra + "\n", new.rstrip() + "\n" + extra + "\n"
        else:
            old = program(rng, codes, g, rng.choice([size // 4, size // 2, size * 3 // 4, size]))
            if not parses(old):
                continue
            result = update(old, g, borrowed)
            if result is None:
                continue
            new, note = result[0], dress(result[1], g)
        old, new = renamer.code(old), renamer.code(new)
        note = renamer.note(note)
        said = thought(old, new, note)
        fits = len(old) <= 1.3 * size and len(said) <= LONGEST_THOUGHT
        if old != new and fits and parses(old) and parses(new):
            version = ".".join(str(rng.randint(0, 30)) for _ in range(rng.choice([2, 3])))
            yield Sample(library, version, note, old, new, said)
