"""Random programs that look like real code, and new names for all that is in them.

A program mixes statements of the training split's programs with those of a small grammar; a
`Renamer` then gives every identifier and number another name, the same in code and note.
"""

import ast
import builtins
import keyword
import random
import re
import warnings

from data import Example

# Names that are never made new: Python's own, and those that every program uses alike.
KEEP = (
    set(keyword.kwlist) | set(dir(builtins)) | {"self", "cls", "args", "kwargs", "main", "f", "r"}
)
WORD = re.compile(r"[A-Za-z_]\w*")
# Words of a note that are code without backticks: `np.sum`, `a_b`, `camelCase` and `call(`.
NOT_PROSE = re.compile(r"\b(?!e\.g|i\.e)\w+(?:[._]\w+)+\b|\b[a-z]+[A-Z]\w+|\b\w+(?=\()")
# The parts of an identifier: "load" and "Frame2" of loadFrame2 are "load", "Frame", "2".
HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# The pieces that the policy's tokenizer never crosses. Spaces stick to punctuation, never to
# words: a name has the same tokens wherever it stands.
SPLIT = r"\n *|[A-Z]?[a-z]+|[A-Z]+|[0-9]|_| ?[^\sA-Za-z0-9_]+ ?| +"
WHOLE = re.compile(r"[A-Za-z_]\w*|" + SPLIT + r"|\s")  # the same with identifiers whole


# ---------------------------------------------------------------- programs

Pieces = tuple[list[str], list[str]]  # a program's imports, and its other statements


def spans(source: str) -> Pieces:
    """Source text of the top-level imports and of the other top-level statements."""
    lines = source.splitlines()
    imports, body = [], []
    for node in ast.parse(source).body:
        start = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        text = "\n".join(lines[start - 1 : node.end_lineno])
        (imports if isinstance(node, (ast.Import, ast.ImportFrom)) else body).append(text)
    return imports, body


class Grammar:
    """Random names, values and statements in the manner of everyday scripts.

        Grammar(random.Random(0), ["load", "frame", "axis"]).statement()   -> "frame = load(axis)"

    Its `rng` is the one that the edits and notes draw from too.
    """

    def __init__(self, rng: random.Random, words: list[str]):
        self.rng, self.words = rng, words

    def name(self) -> str:
        """One to three words: "frame", "load_frame"."""
        count = self.rng.choices([1, 2, 3], [6, 4, 1])[0]
        return "_".join(self.rng.choice(self.words) for _ in range(count))

    def class_name(self) -> str:
        """One or two words: "Frame", "FrameAxis"."""
        count = self.rng.choice([1, 2, 2])
        return "".join(self.rng.choice(self.words).title() for _ in range(count))

    def number(self) -> str:
        """A literal: "7", "512", "3.1"."""
        rng = self.rng
        return rng.choice(
            [str(rng.randint(0, 9)), str(rng.randint(10, 999)), f"{rng.random() * 10:.2g}", "0.5"]
        )

    def string(self) -> str:
        """A literal of one or two words: '"frame-axis"'."""
        rng = self.rng
        joint = rng.choice(["", " ", "-", "_", "/", ": "])
        return f'"{joint.join(rng.choices(self.words, k=rng.choice([1, 1, 2])))}"'

    def dotted(self) -> str:
        """One to three names: "fr.load.axis"."""
        first = self.rng.choice([self.name(), self.name()[:2]])
        return ".".join([first] + [self.name() for _ in range(self.rng.choice([0, 1, 1, 2]))])

    def value(self, depth: int = 0) -> str:
        """An expression; deeper than one call inside another it is a name or a literal."""
        rng, deeper = self.rng, depth + 1
        if depth > 1:
            return rng.choice([self.name, self.number, self.string])()
        forms = [
            self.name,
            self.number,
            self.string,
            lambda: self.call(deeper),
            lambda: self.call(deeper),
            lambda: f"[{self.values(rng.randint(1, 4))}]",
            lambda: f"({self.values(2)})",
            lambda: "{" + ", ".join(self.item() for _ in range(rng.randint(1, 3))) + "}",
            lambda: f"{self.dotted()}[{rng.choice([self.number(), self.string(), self.name()])}]",
            lambda: f"{self.value(2)} {rng.choice('+-*/%')} {self.value(2)}",
            lambda: f"[{self.call(2)} for {self.name()} in {self.name()}]",
            lambda: f'f"{rng.choice(self.words)} {{{self.dotted()}}}"',
            lambda: rng.choice(["True", "False", "None"]),
        ]
        return rng.choice(forms)()

    def values(self, count: int) -> str:
        """Simple values between commas: "axis, 3"."""
        return ", ".join(self.value(2) for _ in range(count))

    def item(self) -> str:
        """A key and a simple value: '"axis": 3'."""
        return f"{self.string()}: {self.value(2)}"

    def call(self, depth: int = 0) -> str:
        """A call with up to two positional and two keyword arguments: "fr.load(axis, frame=3)"."""
        rng, deeper = self.rng, depth + 1
        arguments = [self.value(deeper) for _ in range(rng.choice([0, 1, 1, 2]))]
        arguments += [
            f"{self.name()}={self.value(deeper)}" for _ in range(rng.choice([0, 0, 1, 2]))
        ]
        function = rng.choice([self.dotted, self.dotted, self.name, self.class_name])()
        return f"{function}({', '.join(arguments)})"

    def statement(self) -> str:
        """One statement, a function or class included, of one to three lines."""
        forms = [
            lambda: f"{self.name()} = {self.value()}",
            lambda: f"{self.name()} = {self.call()}",
            lambda: f"{self.name()} = {self.dotted()}.{self.call(1)}",
            lambda: f"{self.name()}, {self.name()} = {self.call()}",
            self.call,
            lambda: f"print({self.value()})",
            lambda: f"print({self.call()}.{self.name()})",
            lambda: f"{self.dotted()} = {self.value()}",
            lambda: f"for {self.name()} in {self.call()}:\n    {self.simple()}",
            lambda: f"with {self.call()} as {self.name()}:\n    {self.simple()}",
            lambda: f"if {self.value(1)}:\n    {self.simple()}",
            lambda: (
                f"def {self.name()}({self.name()}, {self.name()}={self.number()}):\n"
                f"    return {self.call()}"
            ),
            lambda: (
                f"def {self.name()}({self.name()}):\n    {self.simple()}\n"
                f"    return {self.value(1)}"
            ),
            lambda: (
                f"class {self.class_name()}({self.dotted()}):\n    {self.name()} = {self.call()}"
            ),
            lambda: (
                f"@{self.dotted()}\ndef {self.name()}({self.name()}):\n    return {self.call()}"
            ),
        ]
        return self.rng.choice(forms)()

    def simple(self) -> str:
        """A statement of one line."""
        return self.rng.choice(
            [
                f"{self.name()} = {self.call()}",
                self.call(),
                f"print({self.value()})",
                f"{self.name()}.{self.call(1)}",
            ]
        )

    def imports(self) -> str:
        """One import: "import frame.axis as fr", "from frame import load"."""
        module = ".".join(self.name() for _ in range(self.rng.choice([1, 1, 2])))
        return self.rng.choice(
            [
                f"import {module}",
                f"import {module} as {self.name()[:2]}",
                f"from {module} import {self.name()}",
                f"from {module} import {self.class_name()}",
                f"from {module} import {self.class_name()}, {self.name()}",
            ]
        )


def program(rng: random.Random, codes: list[Pieces], grammar: Grammar, size: int) -> str:
    """A program of statements of one or two real programs and of the grammar, about `size` long."""
    imports, body = map(list, rng.choice(codes))
    if rng.random() < 0.15:
        imports, body = [grammar.imports()], [grammar.statement() for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        more, extra = rng.choice(codes)
        imports += [line for line in more if line not in imports and rng.random() < 0.5]
        for text in rng.sample(extra, min(len(extra), 2)):
            body.insert(rng.randint(0, len(body)), text)
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        body.insert(rng.randint(0, len(body)), grammar.statement())
    for lines in (body, imports):
        while len(lines) > 1 and sum(map(len, imports + body)) > size:
            del lines[rng.randrange(len(lines))]
    return joined(imports, body)


def joined(imports: list[str], body: list[str]) -> str:
    """The program of these statements, a blank line before functions and classes."""
    blocks = ("def ", "class ", "@")
    body = ["\n" + text if text.startswith(blocks) else text for text in body]
    return "\n".join([*imports, "", *body]).strip("\n") + "\n"


def parses(code: str) -> bool:
    """Whether `code` is valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


# ---------------------------------------------------------------- names


def vocabulary(examples: list[Example]) -> list[str]:
    """The lower-case parts of all identifiers in the code of `examples`."""
    text = " ".join(e.old_code + e.new_code for e in examples)
    parts = {part for word in WORD.findall(text) for part in HUMP.findall(word)}
    return sorted({part.lower() for part in parts if part.isalpha() and len(part) > 2})


def random_word(rng: random.Random, words: list[str]) -> str:
    """A real part of an identifier or a pronounceable one that nobody has seen."""
    if rng.random() < 0.6:
        return rng.choice(words)
    syllables = "".join(
        rng.choice("bcdfghjklmnprstvwz")
        + rng.choice(["a", "e", "i", "o", "u", "ar", "en", "ist", "ol", "y"])
        for _ in range(rng.choice([1, 2, 2, 3]))
    )
    return syllables + rng.choice(["", "", "n", "r", "s", "t", "x"])


class Renamer:
    """A random but consistent table: parts of identifiers and numbers to others of like style.

    One renamer gives code and note the same new names: `np.product` -> `ke.tarol` in both.
    """

    def __init__(self, rng: random.Random, words: list[str]):
        self.rng, self.words = rng, words
        self.table: dict[str, str] = {}
        self.stay = rng.choice([0.0, 0.0, 0.2, 0.6])  # share of the parts that keep their name

    def part(self, text: str) -> str:
        """The new text of a number or of a part of an identifier, in capitals where that was."""
        key = text.lower()
        if key not in self.table:
            self.table[key] = self.draw(key)
        new = self.table[key]
        if text.isupper() and len(text) > 1:
            return new.upper()
        return new.title() if text[0].isupper() else new

    def draw(self, key: str) -> str:
        """A new text for `key`, which the table does not know yet."""
        if self.rng.random() < self.stay:
            return key
        if key.isdigit():
            highest = 10 ** min(len(key), 4) - 1
            return key if key in "012" else str(self.rng.randint(1, highest))
        if len(key) <= 3:
            return "".join(self.rng.choices("abcdefghiklmnoprstuvwxyz", k=len(key)))
        return random_word(self.rng, self.words)

    def word(self, match: re.Match) -> str:
        """The new name of an identifier; Python's own words and `__names__` stay."""
        text = match[0]
        if text in KEEP or text.startswith("__"):
            return text
        new = HUMP.sub(lambda m: self.part(m[0]), text)
        return new + "_" if new in KEEP else new

    def code(self, text: str) -> str:
        """Code with every identifier and number renamed."""
        text = WORD.sub(self.word, text)
        return re.sub(r"(?<![\w.])\d+", lambda m: self.part(m[0]), text)

    def note(self, text: str) -> str:
        """Only what stands in backticks, and words that cannot be prose, are code."""
        spans = re.split(r"(`+[^`]*`+)", text)
        for i, span in enumerate(spans):
            if i % 2:
                spans[i] = self.code(span)
            else:
                spans[i] = NOT_PROSE.sub(lambda m: self.code(m[0]), span)
        return "".join(spans)
