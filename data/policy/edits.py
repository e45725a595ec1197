"""Made-up API updates: an edit of a program, and a note that tells it as release notes do.

`Update(rng, grammar, borrowed).any(source)` -> (new source, note), of any of the kinds that the
data set has. Notes come from notes.py, and for renames also from the training split.
"""

import ast
import random
import re
from dataclasses import dataclass

from data import Example
from data.policy.notes import Notes, quoted
from data.policy.programs import KEEP, WHOLE, WORD, Grammar, parses


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
        self.notes = Notes(rng, grammar)

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

    def rename(self, code: Code):
        r = self.rng
        nodes = code.attributes + [c.func for c in code.calls if isinstance(c.func, ast.Name)]
        if not nodes:
            return None
        node = r.choice(nodes)
        q, old = self.shown(code, node)
        new = self.fresh(old)
        if r.random() < 0.5 and isinstance(node, ast.Attribute):  # leave other uses of it alone
            source = re.sub(rf"\.{re.escape(old)}\b", f".{new}", code.source)
        else:
            source = re.sub(rf"(?<![\w\"]){re.escape(old)}\b(?!\s*=[^=])", new, code.source)
        kind = r.choice(
            ["function", "method", "attribute", "name", "class", "helper", "alias", "API"]
        )
        calls = r.choice(["", "", "()"])
        qualifier = r.choice([q, q, ""])
        note = self.notes.tell(f"{q}{old}{calls}", f"{qualifier}{new}{calls}", kind)
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
        how = r.random()
        if how < 0.7:
            new = self.fresh(word.arg)
            note = self.notes.tell(word.arg, new, "", q + func)
            return code.replace((start, start + len(word.arg), new)), note
        if how < 0.9:
            before = code.source[:start].rstrip(" \n")
            if before.endswith(","):
                start = len(before) - 1
            elif code.source[end : end + 2] == ", ":
                end += 2
            note = self.notes.tell_gone(word.arg, q + func)
            return code.replace((start, end, "")), note
        if not isinstance(word.value, ast.Constant):
            return None
        new = r.choice([self.g.string(), self.g.string(), self.g.number(), "None", "True", "False"])
        note = self.notes.say(
            "value", q=q, f=func, old=word.arg, value=code.text(word.value), new=new
        )
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
            note = self.notes.say("positional", nth=nth, **names)
            return code.replace(*edits), note
        value = r.choice(
            [self.g.string, self.g.number, lambda: r.choice(["True", "False", "None"])]
        )()
        comma = ", " if call.args or call.keywords else ""
        if code.source[: end - 1].rstrip().endswith(","):
            return None
        note = self.notes.say("argument", value=value, **names)
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
            note = self.notes.say("method", q=q, n=name)
            return code.replace((code.span(node)[1],) * 2 + ("()",)), note
        if not methods:
            return None
        call = r.choice(methods)
        q, name = self.shown(code, call.func)
        note = self.notes.say("property", q=q, n=name)
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
            note = self.notes.tell(old, new, "module")
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
        note = self.notes.say("moved", old=old, new=new, n=name.name)
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
        note = self.notes.tell(old, new, "name")
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
        note = self.notes.say(
            "form", a="{F}({A}{W})".format(**shown), b=pattern.format(**shown), l=last
        )
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
            method = self.rng.choices(kinds, [6, 3, 14, 2.5, 1, 3, 1.5, 8])[0]
            result = method(Code(source))
            if result is None or result[0] == source or not parses(result[0]):
                return None
            source, note = result
            notes.append(note)
        return source, " ".join(notes)
