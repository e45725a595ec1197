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

KEEP = (
    set(keyword.kwlist) | set(dir(builtins)) | {"self", "cls", "args", "kwargs", "main", "f", "r"}
)
WORD = re.compile(r"[A-Za-z_]\w*")
HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# The pieces that the policy's tokenizer never crosses. Spaces stick to punctuation, never to
# words: a name has the same tokens wherever it stands.
SPLIT = r"\n *|[A-Z]?[a-z]+|[A-Z]+|[0-9]|_| ?[^\sA-Za-z0-9_]+ ?| +"
WHOLE = re.compile(r"[A-Za-z_]\w*|" + SPLIT + r"|\s")  # the same with identifiers whole


# ---------------------------------------------------------------- programs


def spans(source: str) -> tuple[list[str], list[str]]:
    """Source text of the top-level imports and of the other top-level statements."""
    lines = source.splitlines()
    imports, body = [], []
    for node in ast.parse(source).body:
        start = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        text = "\n".join(lines[start - 1 : node.end_lineno])
        (imports if isinstance(node, (ast.Import, ast.ImportFrom)) else body).append(text)
    return imports, body


class Grammar:
    """Random statements in the manner of everyday scripts: `Grammar(rng, words).statement()`."""

    def __init__(self, rng: random.Random, words: list[str]):
        self.rng, self.words = rng, words

    def name(self) -> str:
        count = self.rng.choices([1, 2, 3], [6, 4, 1])[0]
        return "_".join(self.rng.choice(self.words) for _ in range(count))

    def camel(self) -> str:
        return "".join(
            self.rng.choice(self.words).title() for _ in range(self.rng.choice([1, 2, 2]))
        )

    def number(self) -> str:
        r = self.rng
        return r.choice(
            [str(r.randint(0, 9)), str(r.randint(10, 999)), f"{r.random() * 10:.2g}", "0.5"]
        )

    def string(self) -> str:
        r = self.rng
        joined = r.choice(["", " ", "-", "_", "/", ": "]).join(
            r.choices(self.words, k=r.choice([1, 1, 2]))
        )
        return f'"{joined}"'

    def dotted(self) -> str:
        r = self.rng
        parts = [r.choice([self.name(), self.name()[:2]])] + [
            self.name() for _ in range(r.choice([0, 1, 1, 2]))
        ]
        return ".".join(parts)

    def value(self, depth: int = 0) -> str:
        r, deeper = self.rng, depth + 1
        if depth > 1:
            return r.choice([self.name, self.number, self.string])()
        forms = [
            lambda: self.name(),
            lambda: self.number(),
            lambda: self.string(),
            lambda: self.call(deeper),
            lambda: self.call(deeper),
            lambda: "[" + ", ".join(self.value(2) for _ in range(r.randint(1, 4))) + "]",
            lambda: "(" + ", ".join(self.value(2) for _ in range(2)) + ")",
            lambda: (
                "{"
                + ", ".join(f"{self.string()}: {self.value(2)}" for _ in range(r.randint(1, 3)))
                + "}"
            ),
            lambda: f"{self.dotted()}[{r.choice([self.number(), self.string(), self.name()])}]",
            lambda: f"{self.value(2)} {r.choice('+-*/%')} {self.value(2)}",
            lambda: f"[{self.call(2)} for {self.name()} in {self.name()}]",
            lambda: f'f"{r.choice(self.words)} {{{self.dotted()}}}"',
            lambda: r.choice(["True", "False", "None"]),
        ]
        return r.choice(forms)()

    def call(self, depth: int = 0) -> str:
        r = self.rng
        args = [self.value(depth + 1) for _ in range(r.choice([0, 1, 1, 2]))]
        args += [f"{self.name()}={self.value(depth + 1)}" for _ in range(r.choice([0, 0, 1, 2]))]
        func = r.choice([self.dotted, self.dotted, self.name, self.camel])()
        return f"{func}({', '.join(args)})"

    def statement(self) -> str:
        r = self.rng
        forms = [
            lambda: f"{self.name()} = {self.value()}",
            lambda: f"{self.name()} = {self.call()}",
            lambda: f"{self.name()} = {self.dotted()}.{self.call(1)}",
            lambda: f"{self.name()}, {self.name()} = {self.call()}",
            lambda: self.call(),
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
            lambda: f"class {self.camel()}({self.dotted()}):\n    {self.name()} = {self.call()}",
            lambda: (
                f"@{self.dotted()}\ndef {self.name()}({self.name()}):\n    return {self.call()}"
            ),
        ]
        return r.choice(forms)()

    def simple(self) -> str:
        return self.rng.choice(
            [
                f"{self.name()} = {self.call()}",
                self.call(),
                f"print({self.value()})",
                f"{self.name()}.{self.call(1)}",
            ]
        )

    def imports(self) -> str:
        module = ".".join(self.name() for _ in range(self.rng.choice([1, 1, 2])))
        return self.rng.choice(
            [
                f"import {module}",
                f"import {module} as {self.name()[:2]}",
                f"from {module} import {self.name()}",
                f"from {module} import {self.camel()}",
                f"from {module} import {self.camel()}, {self.name()}",
            ]
        )


def program(
    rng: random.Random, codes: list[tuple[list[str], list[str]]], grammar: Grammar, size: int
) -> str:
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
    while len(body) > 1 and sum(map(len, imports + body)) > size:
        del body[rng.randrange(len(body))]
    while len(imports) > 1 and sum(map(len, imports + body)) > size:
        del imports[rng.randrange(len(imports))]
    gaps = ["\n\n" if text.startswith(("def ", "class ", "@")) else "\n" for text in body]
    code = (
        "\n".join(imports)
        + "\n"
        + "".join(gap + text for gap, text in zip(gaps, body, strict=True))
    )
    return code.strip("\n") + "\n"


def parses(code: str) -> bool:
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
    return sorted(
        {
            h.lower()
            for w in WORD.findall(text)
            for h in HUMP.findall(w)
            if h.isalpha() and len(h) > 2
        }
    )


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
    """A random but consistent table: parts of identifiers and numbers to others of like style."""

    def __init__(self, rng: random.Random, words: list[str]):
        self.rng, self.words = rng, words
        self.table: dict[str, str] = {}
        self.stay = rng.choice([0.0, 0.0, 0.2, 0.6])  # share of the parts that keep their name

    def part(self, text: str) -> str:
        key = text.lower()
        if key not in self.table:
            if self.rng.random() < self.stay:
                new = key
            elif key.isdigit():
                new = key if key in "012" else str(self.rng.randint(1, 10 ** min(len(key), 4) - 1))
            elif len(key) <= 3:
                new = "".join(self.rng.choices("abcdefghiklmnoprstuvwxyz", k=len(key)))
            else:
                new = random_word(self.rng, self.words)
            self.table[key] = new
        new = self.table[key]
        return (
            new.upper()
            if text.isupper() and len(text) > 1
            else new.title()
            if text[0].isupper()
            else new
        )

    def word(self, match: re.Match) -> str:
        text = match[0]
        if text in KEEP or text.startswith("__"):
            return text
        new = HUMP.sub(lambda m: self.part(m[0]), text)
        return new + "_" if new in KEEP else new

    def code(self, text: str) -> str:
        text = WORD.sub(self.word, text)
        return re.sub(r"(?<![\w.])\d+", lambda m: self.part(m[0]), text)

    def note(self, text: str) -> str:
        """Only what stands in backticks, and words that cannot be prose, are code."""
        spans = re.split(r"(`+[^`]*`+)", text)
        for i, span in enumerate(spans):
            if i % 2:
                spans[i] = self.code(span)
            else:
                spans[i] = re.sub(
                    r"\b(?!e\.g|i\.e)\w+(?:[._]\w+)+\b|\b[a-z]+[A-Z]\w+|\b\w+(?=\()",
                    lambda m: self.code(m[0]),
                    span,
                )
        return "".join(spans)
