"""Endless made-up API updates that look like real code: the text the bundled policy learns from.

A sample starts from a real program of the training split (never a held-out library), mixes in
statements of others or of a small random grammar, applies the pair's own update or a made-up one,
and then gives every identifier, string and number a random new name, the same in code and note:

    base program -> edit (real or made up, with its note) -> rename everything -> Sample

So a model cannot learn one library by heart: all it can learn is to read the note and obey it.
"""

import ast
import builtins
import difflib
import keyword
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

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


# ---------------------------------------------------------------- made-up updates


class Code:
    """A parsed program with its nodes by type and their character spans."""

    def __init__(self, source: str):
        self.source = source
        self.tree = ast.parse(source)
        starts, total = [0], 0
        for line in source.splitlines(keepends=True):
            starts.append(total := total + len(line))
        self.starts = starts
        nodes = list(ast.walk(self.tree))
        # Nodes inside f-strings have no trustworthy position before Python 3.12.
        inside = {id(n) for f in nodes if isinstance(f, ast.JoinedStr) for n in ast.walk(f)}
        nodes = [n for n in nodes if id(n) not in inside]
        self.calls = [n for n in nodes if isinstance(n, ast.Call) and self.text(n.func) not in KEEP]
        self.attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
        called = {id(c.func) for c in self.calls}
        self.properties = [n for n in self.attributes if id(n) not in called]
        self.froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
        self.modules = [n for n in nodes if isinstance(n, ast.Import)]
        self.aliases = {a.asname or a.name: a.name for n in self.modules for a in n.names}

    def span(self, node) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def alone(self, node) -> bool:
        """Whether the name of the function or attribute at `node` stands nowhere else."""
        text = self.text(node)
        name = node.attr if isinstance(node, ast.Attribute) else text
        return name.isidentifier() and len(re.findall(rf"\b{name}\b", self.source)) == 1

    def replace(self, *edits: tuple[int, int, str]) -> str:
        source = self.source
        for start, end, text in sorted(edits, reverse=True):
            source = source[:start] + text + source[end:]
        return source


@dataclass(frozen=True)
class Rename:
    """A real pair in which one identifier, and nothing else, becomes another."""

    note: str
    old: str
    new: str
    role: str  # "keyword", "attribute" or "name"
    owner: str  # of a keyword: the function that takes it


def quoted(note: str) -> set[str]:
    """The words between the backticks of a note."""
    return set(WORD.findall(" ".join(re.findall(r"`([^`]*)`", note))))


def renames(examples: list[Example]) -> list[Rename]:
    """The pairs of `examples` that only rename, and whose note shows both names."""
    found = []
    for e in examples:
        a, b = WHOLE.findall(e.old_code), WHOLE.findall(e.new_code)
        swaps = {(x, y) for x, y in zip(a, b, strict=False) if x != y}
        if len(a) != len(b) or len(swaps) != 1:
            continue
        old, new = swaps.pop()
        shown = quoted(e.update_info)
        if old not in shown or new not in shown or {old, new} & KEEP:
            continue
        code = Code(e.old_code)
        owners = [
            code.text(c.func).split(".")[-1] for c in code.calls for k in c.keywords if k.arg == old
        ]
        attribute = any(n.attr == old for n in code.attributes)
        role = "keyword" if owners else "attribute" if attribute else "name"
        found.append(Rename(e.update_info, old, new, role, owners[0] if owners else ""))
    return found


class Update:
    """Made-up updates: each method edits one program and returns `(new_source, note)` or None.

    `borrowed` are real renames, whose notes `borrow` takes.
    """

    def __init__(self, rng: random.Random, grammar: Grammar, borrowed: list[Rename]):
        self.rng, self.g, self.borrowed = rng, grammar, borrowed

    def fresh(self, old: str) -> str:
        """A new name for `old`: another word, or the same with a part added, dropped or changed."""
        r, parts = self.rng, old.split("_")
        if old[:1].isupper():
            return self.g.camel() if r.random() < 0.6 else old + r.choice(self.g.words).title()
        how = r.random()
        if how < 0.45:
            return self.g.name()
        if how < 0.65:
            return old + "_" + r.choice(self.g.words)
        if how < 0.8 and len(parts) > 1:
            return r.choice(["", "_"]).join(parts[:-1]) + r.choice(
                ["", "_" + r.choice(self.g.words)]
            )
        parts[r.randrange(len(parts))] = r.choice(self.g.words)
        return "_".join(parts)

    def shown(self, code: Code, node) -> tuple[str, str]:
        """How a note names the function or attribute at `node`: (qualifier and dot, last name)."""
        r = self.rng
        if isinstance(node, ast.Attribute):
            base = code.text(node.value)
            if base in code.aliases:
                return r.choice([base, code.aliases[base], code.aliases[base]]) + ".", node.attr
            return r.choice(["", "", self.g.camel() + ".", self.g.camel() + "."]), node.attr
        text = code.text(node)
        return r.choice(["", "", self.g.name() + "."]), text if text.isidentifier() else "call"

    def say(self, *templates: str, **names: str) -> str:
        return self.rng.choice(templates).format(**names)

    def rename(self, code: Code):
        r = self.rng
        nodes = code.attributes + [c.func for c in code.calls if isinstance(c.func, ast.Name)]
        if not nodes:
            return None
        node = r.choice(nodes)
        q, old = self.shown(code, node)
        new = self.fresh(old)
        source = re.sub(rf"(?<![\w\"]){re.escape(old)}\b(?!\s*=[^=])", new, code.source)
        if r.random() < 0.5:  # leave other uses of the word alone where the edit was an attribute
            source = (
                re.sub(rf"\.{re.escape(old)}\b", f".{new}", code.source)
                if isinstance(node, ast.Attribute)
                else source
            )
        kind = r.choice(
            ["function", "method", "attribute", "name", "class", "helper", "alias", "API"]
        )
        note = self.say(
            "`{q}{old}` was renamed to `{q}{new}`.",
            "`{q}{old}` has been renamed `{q}{new}`.",
            "`{q}{old}` is deprecated in favor of `{q}{new}`.",
            "`{q}{old}` is deprecated, use `{q}{new}` instead.",
            "`{q}{old}` has been removed. Use `{q}{new}` instead.",
            "`{q}{old}()` has been removed; call `{q}{new}()` instead.",
            "The {kind} `{old}` is now called `{new}`.",
            "The {kind} `{q}{old}` is gone. Its replacement is `{q}{new}`, with equal arguments.",
            "The {kind} `{q}{old}` was removed after a deprecation period. Use `{new}`.",
            "Renamed `{q}{old}` to `{q}{new}`.",
            "Deprecated `{q}{old}`. Use `{q}{new}`, which behaves the same.",
            "Use `{q}{new}` in place of `{q}{old}`, which no longer exists.",
            "Code that calls `{q}{old}` must call `{q}{new}` now; the arguments did not change.",
            q=q, old=old, new=new, kind=kind,
        )  # fmt: skip
        return source, note

    def borrow(self, code: Code):
        """The note of a real rename, told of a name that plays the same part in this program."""
        r, source = self.rng, code.source
        real = r.choice(self.borrowed)
        called = [c.func for c in code.calls]
        owner = ""
        if real.role == "keyword":
            words = [(c, k.arg) for c in code.calls for k in c.keywords if k.arg]
            words = [(c, word) for c, word in words if word not in KEEP]
            if not words:
                return None
            call, old = r.choice(words)
            owner = code.text(call.func).split(".")[-1]
            pattern = rf"(?<=[(,\s]){old}(?=\s*=[^=])"
        elif real.role == "attribute":
            old = r.choice([n.attr for n in code.attributes] or [""])
            pattern = rf"(?<=\.){old}\b"
        else:
            old = r.choice([code.text(f) for f in called if isinstance(f, ast.Name)] or [""])
            pattern = rf"\b{old}\b"
        if not old or old in KEEP:
            return None
        new = self.fresh(old)
        names = {real.old: old, real.new: new}
        if owner.isidentifier():
            names[real.owner] = owner

        def rename(match: re.Match) -> str:
            return names.get(match[0], match[0])

        parts = re.split(r"(`+[^`]*`+)", real.note)
        note = "".join(WORD.sub(rename, x) if x.startswith("`") else x for x in parts)
        return re.sub(pattern, new, source), note

    def keyword(self, code: Code):
        """A keyword argument renamed, removed, or given another value."""
        r = self.rng
        found = [(c, k) for c in code.calls for k in c.keywords if k.arg and code.alone(c.func)]
        if not found:
            return None
        call, word = r.choice(found)
        (start, end), (q, func) = code.span(word), self.shown(code, call.func)
        value = code.text(word.value)
        names = dict(q=q, f=func, old=word.arg, value=value)
        how = r.random()
        if how < 0.55:
            new = self.fresh(word.arg)
            note = self.say(
                "The `{old}` argument of `{q}{f}` was renamed to `{new}`.",
                "The `{old}` parameter of `{q}{f}` is deprecated; use `{new}` instead.",
                "`{q}{f}`: the keyword `{old}` has been renamed `{new}`.",
                "`{q}{f}` no longer accepts `{old}`. Pass `{new}` instead.",
                "In `{q}{f}`, `{old}` was replaced by `{new}`, with the same meaning.",
                "Renamed the keyword argument `{old}` to `{new}` in `{q}{f}()`.",
                "`{q}{f}(..., {old}=...)` is now spelled `{q}{f}(..., {new}=...)`.",
                "Keyword `{old}` of `{q}{f}` is gone; the same setting is called `{new}`.",
                "`{old}` is now `{new}` in `{q}{f}`.",
                new=new, **names,
            )  # fmt: skip
            return code.replace((start, start + len(word.arg), new)), note
        if how < 0.8:
            before = code.source[:start].rstrip(" \n")
            if before.endswith(","):
                start = len(before) - 1
            elif code.source[end : end + 2] == ", ":
                end += 2
            note = self.say(
                "The `{old}` argument of `{q}{f}` has been removed. Drop it.",
                "`{q}{f}` no longer takes `{old}`; remove the argument.",
                "The `{old}` parameter was removed from `{q}{f}`, since it had no effect.",
                "`{q}{f}`: `{old}` is gone. It did nothing; simply leave it out.",
                "Removed the deprecated `{old}` keyword of `{q}{f}`. Calls should omit it.",
                "Passing `{old}` to `{q}{f}` raises a TypeError; `{old}={value}` is built in.",
                **names,
            )  # fmt: skip
            return code.replace((start, end, "")), note
        if not isinstance(word.value, ast.Constant):
            return None
        new = r.choice([self.g.string(), self.g.string(), self.g.number(), "None", "True", "False"])
        note = self.say(
            "`{q}{f}` does not accept `{old}={value}` any more. Use `{old}={new}`.",
            "The value `{value}` of `{old}` in `{q}{f}` is deprecated, write `{new}`.",
            "For `{q}{f}`, `{old}={value}` was replaced by `{old}={new}`.",
            new=new, **names,
        )  # fmt: skip
        return code.replace((*code.span(word.value), new)), note

    def argument(self, code: Code):
        """An argument added, or a positional one that must be named."""
        r = self.rng
        calls = [
            c
            for c in code.calls
            if code.alone(c.func)
            and not any(isinstance(a, (ast.Starred, ast.GeneratorExp)) for a in c.args)
        ]
        if not calls:
            return None
        call = r.choice(calls)
        (q, func), (_, end) = self.shown(code, call.func), code.span(call)
        names = dict(q=q, f=func, k=self.g.name())
        if call.args and r.random() < 0.5:
            index = r.randrange(len(call.args))
            words = [self.g.name() for _ in call.args[index:]]
            names["k"] = words[0]
            edits = [
                (*code.span(a), f"{w}={code.text(a)}")
                for a, w in zip(call.args[index:], words, strict=True)
            ]
            names["all"] = " and ".join(f"`{w}`" for w in words)
            nth = ["first", "second", "third", "fourth", "fifth"][min(index, 4)]
            note = self.say(
                "The arguments of `{q}{f}` from the {nth} on are keyword-only: {all}.",
                "In `{q}{f}`, {all} must be passed by keyword now.",
                "`{q}{f}`: the {nth} argument is keyword-only, so name {all}.",
                "Passing {all} to `{q}{f}` by position is no longer allowed. Write `{k}=...`.",
                nth=nth, **names,
            )  # fmt: skip
            return code.replace(*edits), note
        value = r.choice(
            [self.g.string, self.g.number, lambda: r.choice(["True", "False", "None"])]
        )()
        comma = ", " if call.args or call.keywords else ""
        if code.source[: end - 1].rstrip().endswith(","):
            return None
        note = self.say(
            "`{q}{f}` now requires `{k}`. Pass `{k}={value}` to keep the old behavior.",
            "The default of `{k}` in `{q}{f}` changed; write `{k}={value}` for the old one.",
            "`{k}` became a required argument of `{q}{f}`: add `{k}={value}`.",
            "The default of `{k}` in `{q}{f}` is no longer `{value}`. Give `{k}={value}`.",
            "`{q}{f}` takes a new argument `{k}`. Old calls add `{k}={value}` at the end.",
            value=value, **names,
        )  # fmt: skip
        return code.replace((end - 1, end - 1, f"{comma}{names['k']}={value}")), note

    def property(self, code: Code):
        """An attribute that becomes a method, or the reverse."""
        r = self.rng
        loads = [
            n
            for n in code.properties
            if isinstance(n.ctx, ast.Load)
            and code.text(n.value) not in code.aliases
            and code.alone(n)
        ]
        methods = [
            c
            for c in code.calls
            if isinstance(c.func, ast.Attribute)
            and code.alone(c.func)
            and not c.args
            and not c.keywords
        ]
        if loads and (not methods or r.random() < 0.5):
            node = r.choice(loads)
            q, name = self.shown(code, node)
            note = self.say(
                "`{q}{n}` is now a method. Call `{q}{n}()`.",
                "The property `{q}{n}` became a method: write `{n}()`.",
                "`{q}{n}` was turned from an attribute into a method: call it, `{n}()`.",
                q=q, n=name,
            )  # fmt: skip
            return code.replace((code.span(node)[1],) * 2 + ("()",)), note
        if not methods:
            return None
        call = r.choice(methods)
        q, name = self.shown(code, call.func)
        note = self.say(
            "`{q}{n}()` is now a property. Use `{q}{n}` without parentheses.",
            "The method `{q}{n}` became a property: drop the parentheses.",
            "`{q}{n}` was turned from a method into a property, so `{n}()` is written `{n}`.",
            q=q, n=name,
        )  # fmt: skip
        return code.replace((code.span(call.func)[1], code.span(call)[1], "")), note

    def module(self, code: Code):
        """A module renamed, or a name moved to another module."""
        r = self.rng
        nodes = code.froms + code.modules
        if not nodes:
            return None
        node = r.choice(nodes)
        if isinstance(node, ast.ImportFrom):
            old = node.module
        else:
            old = r.choice(node.names).name
        if not old:
            return None
        new = r.choice(
            [
                old + "." + self.g.name(),
                ".".join([*old.split(".")[:-1], self.g.name()]),
                self.g.name(),
            ]
        )
        if "." in old and r.random() < 0.3:
            new = old.rsplit(".", 1)[0]
        if isinstance(node, ast.Import):
            source = re.sub(rf"(?<![\w.]){re.escape(old)}\b(?!\")", new, code.source)
            note = self.say(
                "The module `{old}` was renamed to `{new}`.",
                "Module `{old}` is gone; import `{new}` instead.",
                "`{old}` has moved to `{new}`.",
                "`import {old}` no longer works. Use `import {new}`, which offers the same names.",
                old=old, new=new,
            )  # fmt: skip
            return source, note
        start, end = code.span(node)
        name = r.choice(node.names)
        text = name.name + (f" as {name.asname}" if name.asname else "")
        rest = [
            n.name + (f" as {n.asname}" if n.asname else "") for n in node.names if n is not name
        ]
        line = f"from {new} import {text}"
        if rest:
            line = r.choice(
                [
                    f"from {old} import {', '.join(rest)}\n{line}",
                    f"{line}\nfrom {old} import {', '.join(rest)}",
                ]
            )
        note = self.say(
            "`{n}` has moved from `{old}` to `{new}`.",
            "`{old}.{n}` was moved to `{new}.{n}`.",
            "`{n}` must now be imported from `{new}`; `{old}.{n}` is gone.",
            "Use `from {new} import {n}`: `{old}` no longer exports it.",
            "`{old}.{n}` is deprecated. Import `{n}` from `{new}` instead.",
            old=old, new=new, n=name.name,
        )  # fmt: skip
        return code.replace((start, end, line)), note

    def nest(self, code: Code):
        """`m.f` moves to `m.sub.f`, comes up from there, or goes elsewhere."""
        r = self.rng
        found = [n for n in code.attributes if code.text(n.value).replace(".", "").isidentifier()]
        if not found:
            return None
        node = r.choice(found)
        base, old = code.text(node.value), code.text(node)
        forms = [
            f"{base}.{self.g.name()}.{node.attr}",
            f"{base}.{self.g.camel()}.{node.attr}",
            f"{base}.{self.g.name()}.{self.g.name()}",
        ]
        if "." in base:
            forms += [base.rsplit(".", 1)[0] + "." + node.attr] * 3
        new = r.choice(forms)
        source = re.sub(rf"(?<![\w.]){re.escape(old)}\b", new, code.source)
        note = self.say(
            "`{old}` has moved to `{new}`.",
            "`{old}` was removed. Use `{new}`.",
            "`{old}` is available as `{new}` only.",
            "`{old}` is deprecated and lives on as `{new}`.",
            old=old, new=new,
        )  # fmt: skip
        return source, note

    def form(self, code: Code):
        """A call written in another form, told by a pattern with the call's or the note's names."""
        r = self.rng
        found = [
            c
            for c in code.calls
            if code.alone(c.func) and not any(isinstance(a, ast.Starred) for a in c.args)
        ]
        if not found:
            return None
        call = r.choice(found)
        given = [code.text(a) for a in call.args]
        words = [f"{k.arg}={code.text(k.value)}" for k in call.keywords if k.arg]
        method = isinstance(call.func, ast.Attribute)
        base = code.text(call.func.value) if method else ""
        known = base in code.aliases
        f = code.text(call.func)
        last = call.func.attr if method else f
        if len(base) > 30 or any("\n" in x for x in [base, *given, *words]):
            return None
        new, other, third = self.g.name(), self.g.name(), self.g.name()
        owner = r.choice(list(code.aliases) or [self.g.name()[:2]])
        pattern = r.choice(self.forms(method and not known, len(given)))
        real = dict(
            R=base, F=f, L=last, n=new, o=other, t=third, M=owner, B=base + "." if known else ""
        )
        real |= {
            "A": ", ".join(given),
            "W": "".join(", " + w for w in words) if given else ", ".join(words),
        }
        real |= {f"A{i}": a for i, a in enumerate(given)} | {
            "rest": "".join(", " + a for a in given[1:])
        }
        if r.random() < 0.5:  # the note speaks of its own variables
            own = [self.g.name() for _ in given]
            shown = real | {
                "R": self.g.name(),
                "A": ", ".join(own),
                "rest": "".join(", " + a for a in own[1:]),
            }
            shown |= {f"A{i}": a for i, a in enumerate(own)}
            shown |= {"F": f if known or not method else f"{shown['R']}.{last}"}
        else:
            shown = dict(real)
        if words and r.random() < 0.7:
            shown["W"] = ""
        note = self.say(
            "`{a}` was removed. Write `{b}` instead.",
            "`{a}` is deprecated, use `{b}`.",
            "`{a}` is replaced by `{b}`.",
            "Instead of `{a}`, write `{b}`.",
            "`{l}` is gone: `{a}` becomes `{b}`.",
            "`{l}` has been removed in favor of `{b}`.",
            "The old form `{a}` no longer works. The same is now written `{b}`.",
            a="{F}({A}{W})".format(**shown), b=pattern.format(**shown), l=last,
        )  # fmt: skip
        return code.replace((*code.span(call), pattern.format(**real))), note

    def forms(self, method: bool, count: int) -> list[str]:
        """Patterns of new code for a call with `count` positional arguments."""
        some = [
            "{F}({A}{W}).{n}", "{F}({A}{W}).{n}()", "{F}.{n}({A}{W})", "{B}{n}.{o}({A}{W})",
            "{F}({A}{W})[0]", "{M}.{n}({F}({A}{W}))", "list({F}({A}{W}))",
        ]  # fmt: skip
        if method:
            some += ["{R}.{n}.{o}({A}{W})", "{R}.{n}().{o}({A}{W})", "{R}.{n}({A}{W}).{o}()"] * 2
            some += (
                ["{M}.{n}({R})"]
                if not count
                else ["{M}.{n}({R}, {A}{W})", "{n}({R}, {A}{W})", "{M}.{n}([{R}, {A}]{W})"] * 2
            )
        if count:
            some += [
                "{F}([{A}]{W})",
                "{B}{n}({o}({A0}){rest}{W})",
                "{M}.{n}({A}{W})",
                "{B}{n}({A}{W}).{o}()",
                "{F}({n}={A0}{rest}{W})" if count == 1 else "{F}({A}{W})[{n}]",
            ]
        if count == 1:
            some += ["{A0}.{n}()", "{A0}.{n}", "{B}{n}({A0}, {o}={M}.{t})"]
        if count == 2:
            some += [
                "{A0}.{n}({A1}{W})",
                "{F}(({A}){W})",
                "{B}{n}({A1}, {A0}{W})",
                "{F}({A0}, {n}={A1}{W})",
            ]
        return some

    def any(self, source: str):
        """One made-up update of `source`, sometimes two; None where it leads nowhere."""
        kinds = [
            self.borrow,
            self.rename,
            self.keyword,
            self.argument,
            self.property,
            self.module,
            self.nest,
            self.form,
        ]
        notes = []
        for _ in range(self.rng.choices([1, 2], [12, 1])[0]):
            method = self.rng.choices(kinds, [12, 4, 4, 3, 1.5, 2.5, 1.5, 5])[0]
            result = method(Code(source))
            if result is None or result[0] == source or not parses(result[0]):
                return None
            source, note = result
            notes.append(note)
        return source, " ".join(notes)


# ---------------------------------------------------------------- notes


def dress(rng: random.Random, note: str, g: Grammar) -> str:
    """Add what release notes have around the one sentence that matters."""
    other, another, word = g.name(), g.name(), g.camel()
    after = [
        f"`{other}` was renamed to `{another}` as well.",
        f"`{other}()` is deprecated, use `{another}()`.",
        f"The `{other}` argument of `{word}.{another}` has been removed.",
        f"`{other}` now accepts `{another}`.",
        f"`{word}` gained a `{other}` argument.",
        "The old name still worked with a warning before.",
        "The arguments are the same.",
        "The behavior does not change.",
        "This completes a deprecation that began earlier.",
        "Code that uses the old spelling raises an error.",
        "Several bugs were fixed.",
    ]
    before = [
        "API change: ", "Deprecated: ", "Removed: ", "Breaking change: ", "Changed: ",
        "Removal of deprecated code: ", "Expired deprecations: ", "Backwards incompatible: ",
        "This release cleans up the public API. ", "Several names were changed. ",
        f"`{other}` is faster now. ", f"`{other}` was renamed to `{another}`. ",
    ]  # fmt: skip
    if rng.random() < 0.35:
        note = rng.choice(before) + note
    while rng.random() < 0.35:
        note = f"{note} {rng.choice(after)}"
    return note


# ---------------------------------------------------------------- renaming


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


def thought(old: str, new: str, note: str) -> str:
    """What changes, line by line: "Replace `product(a) / n` by `prod(a) / n`."

    A patch begins at the name by which the note tells the place and goes to the end of the line. So
    thought and answer are written by copying forwards, from the note, from the old code or from
    the thought itself: small models do not learn to step back to where a line began, and where a
    shorter patch ends they can only guess.
    """
    a, b = WHOLE.findall(old), WHOLE.findall(new)
    shown = quoted(note) - set(keyword.kwlist)
    said = []
    for i, j, k, m in changed_lines(a, b):
        begin = i
        if i == j or a[i] not in shown:
            words = [n for n in range(i) if WORD.fullmatch(a[n])]
            here = [n for n in words if not any("\n" in word for word in a[n:i])]
            names = [a[n] for n in here if a[n] in shown]
            if names:
                begin = max(n for n in here if a[n] == rarest(names, a))
            elif i == j or not WORD.fullmatch(a[i]):
                begin = (here or words or [i])[-1]
        before, after = "".join(a[begin:j]), "".join(a[begin:i] + b[k:m])
        said.append(f"Replace `{before}` by `{after}`.")
    return " ".join(said)


def changed_lines(a: list[str], b: list[str]) -> list[list[int]]:
    """[i, j, k, m] for each change: a[i:j] becomes b[k:m], both to the end of the line."""
    found: list[list[int]] = []
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    for i, j, k, m in (where for op, *where in opcodes if op != "equal"):
        end = next((n for n in range(j, len(a)) if "\n" in a[n]), len(a))
        if found and i <= found[-1][1]:  # on the line of the last change
            found[-1][1::2] = end, m + end - j
        else:
            found.append([i, end, k, m + end - j])
    return found


def rarest(names: list[str], words: list[str]) -> str:
    """Of `names` the one that stands least often among `words`, the longest of several."""
    return min(names, key=lambda name: (words.count(name), -len(name), name))


# ---------------------------------------------------------------- the stream


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


def stream(
    examples: list[Example],
    seed: int,
    real: float = 0.4,
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
            result = Update(rng, g, borrowed).any(old)
            if result is None:
                continue
            new, note = result[0], dress(rng, result[1], g)
        old, new = renamer.code(old), renamer.code(new)
        note = renamer.note(note)
        said = thought(old, new, note)
        fits = len(old) <= 1.3 * size and len(said) <= LONGEST_THOUGHT
        if old != new and fits and parses(old) and parses(new):
            version = ".".join(str(rng.randint(0, 30)) for _ in range(rng.choice([2, 3])))
            yield Sample(library, version, note, old, new, said)


def parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True
