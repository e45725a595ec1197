"""Made-up API updates: an edit of a program, and a note that tells it as release notes do.

    update(source, grammar, borrowed)  -> (new source, note), or None where it leads nowhere

draws one of these kinds, the kinds that the data set has:

    rename            np.product(a)    -> np.multiply(a)
    borrow            the same, told in the words of a real note of the training split
    move              np.norm(a)       -> np.linalg.norm(a), and back
    change_module     import old       -> import new
    change_keyword    run(a, axis=0)   -> run(a, dim=0), run(a), run(a, axis=None)
    change_argument   run(a)           -> run(a, depth=3), run(value=a)
    change_attribute  data.size        -> data.size(), and back
    change_form       run(a, b)        -> a.run(b), run([a, b]), run(a, b).sum(), ...

Each is a function of the program and of a `Grammar`, which draws all that is random (`borrow` takes
the real notes too). It gives the new source and the note, or None where the program has no place
for it. The order of the draws fixes the text that the policy learns from: keep it.
"""

import ast
import functools
import random
import re
from dataclasses import dataclass

from data import Example
from data.policy.notes import quoted, say, tell, tell_gone
from data.policy.programs import KEEP, WHOLE, WORD, Grammar, parses

Edit = tuple[str, str]  # (new source, note)


# ---------------------------------------------------------------- a program and its places


class Code:
    """A parsed program with its nodes by type and their character spans."""

    def __init__(self, source: str):
        self.source = source
        tree = ast.parse(source)
        self.starts = [0]  # where each line begins
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        nodes = list(ast.walk(tree))
        # Nodes inside f-strings have no trustworthy position before Python 3.12.
        strings = [n for n in nodes if isinstance(n, ast.JoinedStr)]
        inside = {id(n) for string in strings for n in ast.walk(string)}
        nodes = [n for n in nodes if id(n) not in inside]
        self.calls = [n for n in nodes if isinstance(n, ast.Call) and self.text(n.func) not in KEEP]
        self.attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
        self.imports = [n for n in nodes if isinstance(n, ast.Import)]
        self.from_imports = [n for n in nodes if isinstance(n, ast.ImportFrom)]
        # The module behind each imported name: {"np": "numpy"}.
        self.modules = {a.asname or a.name: a.name for n in self.imports for a in n.names}

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where the text of `node` begins and ends in the source."""
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        """The text of `node`: "np.sum" of the function in `np.sum(a)`."""
        start, end = self.span(node)
        return self.source[start:end]

    def once(self, node: ast.AST) -> bool:
        """Whether the name of the function or attribute at `node` stands nowhere else."""
        text = self.text(node)
        name = node.attr if isinstance(node, ast.Attribute) else text
        return name.isidentifier() and len(re.findall(rf"\b{name}\b", self.source)) == 1

    def replace(self, *edits: tuple[int, int, str]) -> str:
        """The source with each (start, end, text) put in place, all counted in the old source."""
        source = self.source
        for start, end, text in sorted(edits, reverse=True):
            source = source[:start] + text + source[end:]
        return source


def new_name(grammar: Grammar, old: str) -> str:
    """A new name for `old`: another word, or the same with a part added, dropped or changed."""
    rng, parts = grammar.rng, old.split("_")
    if old[:1].isupper():
        keeps = rng.random() >= 0.6
        return old + rng.choice(grammar.words).title() if keeps else grammar.class_name()
    draw = rng.random()
    if draw < 0.45:
        return grammar.name()
    if draw < 0.65:
        return old + "_" + rng.choice(grammar.words)
    if draw < 0.8 and len(parts) > 1:
        joint = rng.choice(["", "_"])
        return joint.join(parts[:-1]) + rng.choice(["", "_" + rng.choice(grammar.words)])
    parts[rng.randrange(len(parts))] = rng.choice(grammar.words)
    return "_".join(parts)


def shown(code: Code, node: ast.AST, grammar: Grammar) -> tuple[str, str]:
    """How a note names the function or attribute at `node`: ("numpy.", "sum") of `np.sum`."""
    rng, text = grammar.rng, code.text(node)
    if not isinstance(node, ast.Attribute):
        return rng.choice(["", "", grammar.name() + "."]), text if text.isidentifier() else "call"
    owner = code.text(node.value)
    if owner in code.modules:
        return rng.choice([owner, code.modules[owner], code.modules[owner]]) + ".", node.attr
    qualifiers = ["", "", grammar.class_name() + ".", grammar.class_name() + "."]
    return rng.choice(qualifiers), node.attr


# ---------------------------------------------------------------- names


def rename(code: Code, grammar: Grammar) -> Edit | None:
    """A function or attribute renamed: `np.product(a)` -> `np.multiply(a)`."""
    rng, source = grammar.rng, code.source
    nodes = code.attributes + [c.func for c in code.calls if isinstance(c.func, ast.Name)]
    if not nodes:
        return None
    node = rng.choice(nodes)
    qualifier, old = shown(code, node, grammar)
    new = new_name(grammar, old)
    if rng.random() < 0.5 and isinstance(node, ast.Attribute):  # leave other uses of it alone
        source = re.sub(rf"\.{re.escape(old)}\b", f".{new}", source)
    else:
        source = re.sub(rf"(?<![\w\"]){re.escape(old)}\b(?!\s*=[^=])", new, source)
    kind = rng.choice(
        ["function", "method", "attribute", "name", "class", "helper", "alias", "API"]
    )
    parentheses = rng.choice(["", "", "()"])
    again = rng.choice([qualifier, qualifier, ""])
    note = tell(grammar, f"{qualifier}{old}{parentheses}", f"{again}{new}{parentheses}", kind)
    return source, note


def move(code: Code, grammar: Grammar) -> Edit | None:
    """A name moved: `np.norm` -> `np.linalg.norm`, `np.linalg.norm` -> `np.norm` or elsewhere."""
    rng = grammar.rng
    nodes = [n for n in code.attributes if code.text(n.value).replace(".", "").isidentifier()]
    if not nodes:
        return None
    node = rng.choice(nodes)
    owner, old = code.text(node.value), code.text(node)
    places = [
        f"{owner}.{grammar.name()}.{node.attr}",
        f"{owner}.{grammar.class_name()}.{node.attr}",
        f"{owner}.{grammar.name()}.{grammar.name()}",
    ]
    if "." in owner:
        places += [owner.rsplit(".", 1)[0] + "." + node.attr] * 3
    new = rng.choice(places)
    source = re.sub(rf"(?<![\w.]){re.escape(old)}\b", new, code.source)
    return source, tell(grammar, old, new, "name")


def change_module(code: Code, grammar: Grammar) -> Edit | None:
    """A module renamed, or a name moved to another module."""
    rng = grammar.rng
    statements = code.from_imports + code.imports
    if not statements:
        return None
    statement = rng.choice(statements)
    whole = isinstance(statement, ast.Import)
    old = rng.choice(statement.names).name if whole else statement.module
    if not old:  # from . import name
        return None
    above = old.split(".")[:-1]
    new = rng.choice(
        [old + "." + grammar.name(), ".".join([*above, grammar.name()]), grammar.name()]
    )
    if above and rng.random() < 0.3:
        new = ".".join(above)
    if not whole:
        return move_import(code, rng, statement, new)
    source = re.sub(rf"(?<![\w.]){re.escape(old)}\b(?!\")", new, code.source)
    return source, tell(grammar, old, new, "module")


def move_import(code: Code, rng: random.Random, statement: ast.ImportFrom, new: str) -> Edit:
    """One name of `from old import a, b` now comes from the module `new`, on a line of its own."""
    name, old = rng.choice(statement.names), statement.module
    line = f"from {new} import {ast.unparse(name)}"
    rest = [ast.unparse(other) for other in statement.names if other is not name]
    if rest:
        stays = f"from {old} import {', '.join(rest)}"
        line = rng.choice([f"{stays}\n{line}", f"{line}\n{stays}"])
    note = say(rng, "moved", old=old, new=new, name=name.name)
    return code.replace((*code.span(statement), line)), note


# ---------------------------------------------------------------- names, in the words of real notes


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
    for example in examples:
        olds, news = WHOLE.findall(example.old_code), WHOLE.findall(example.new_code)
        swaps = {pair for pair in zip(olds, news, strict=False) if pair[0] != pair[1]}
        if len(olds) != len(news) or len(swaps) != 1:
            continue
        old, new = swaps.pop()
        if {old, new} <= quoted(example.update_info) - KEEP:
            role, owner = part_played(Code(example.old_code), old)
            found.append(Rename(example.update_info, old, new, role, owner))
    return found


def part_played(code: Code, name: str) -> tuple[str, str]:
    """What `name` is in the program, and of a keyword the function: ("keyword", "sum")."""
    calls = [c for c in code.calls for word in c.keywords if word.arg == name]
    if calls:
        return "keyword", last_part(code, calls[0])
    return "attribute" if any(n.attr == name for n in code.attributes) else "name", ""


def last_part(code: Code, call: ast.Call) -> str:
    """The last name of the called function: "sum" of `np.sum(a)`."""
    return code.text(call.func).split(".")[-1]


def borrow(code: Code, grammar: Grammar, borrowed: list[Rename]) -> Edit | None:
    """The note of a real rename, told of a name that plays the same part in this program."""
    real = grammar.rng.choice(borrowed)
    old, owner, uses = stand_in(code, grammar.rng, real.role)
    if not old or old in KEEP:
        return None
    new = new_name(grammar, old)
    names = {real.old: old, real.new: new}
    if owner.isidentifier():
        names[real.owner] = owner

    def swap(text: str) -> str:
        return WORD.sub(lambda word: names.get(word[0], word[0]), text)

    parts = re.split(r"(`+[^`]*`+)", real.note)
    note = "".join(swap(part) if part.startswith("`") else part for part in parts)
    return re.sub(uses, new, code.source), note


def stand_in(code: Code, rng: random.Random, role: str) -> tuple[str, str, str]:
    """A name of the program with that role, its function if it is a keyword, a pattern of its uses.

    The name is "" where the program has none.
    """
    if role == "keyword":
        words = [(call, word.arg) for call in code.calls for word in call.keywords if word.arg]
        words = [(call, name) for call, name in words if name not in KEEP]
        if not words:
            return "", "", ""
        call, name = rng.choice(words)
        return name, last_part(code, call), rf"(?<=[(,\s]){name}(?=\s*=[^=])"
    if role == "attribute":
        name = rng.choice([n.attr for n in code.attributes] or [""])
        return name, "", rf"(?<=\.){name}\b"
    functions = [c.func for c in code.calls if isinstance(c.func, ast.Name)]
    name = rng.choice([code.text(f) for f in functions] or [""])
    return name, "", rf"\b{name}\b"


# ---------------------------------------------------------------- arguments


def change_keyword(code: Code, grammar: Grammar) -> Edit | None:
    """A keyword argument renamed, removed, or given another value."""
    rng = grammar.rng
    words = [(c, word) for c in code.calls for word in c.keywords if word.arg and code.once(c.func)]
    if not words:
        return None
    call, word = rng.choice(words)
    function = "".join(shown(code, call.func, grammar))
    draw = rng.random()
    if draw < 0.7:
        start, _ = code.span(word)
        new = new_name(grammar, word.arg)
        note = tell(grammar, word.arg, new, "", function)
        return code.replace((start, start + len(word.arg), new)), note
    if draw < 0.9:
        return without(code, word), tell_gone(grammar, word.arg, function)
    if not isinstance(word.value, ast.Constant):
        return None
    values = [grammar.string(), grammar.string(), grammar.number(), "None", "True", "False"]
    old, new = code.text(word.value), rng.choice(values)
    note = say(rng, "value", function=function, keyword=word.arg, old=old, new=new)
    return code.replace((*code.span(word.value), new)), note


def without(code: Code, word: ast.keyword) -> str:
    """The source without a keyword argument and its comma: `run(a, axis=0)` -> `run(a)`."""
    start, end = code.span(word)
    before = code.source[:start].rstrip(" \n")
    if before.endswith(","):
        start = len(before) - 1
    elif code.source[end : end + 2] == ", ":
        end += 2
    return code.replace((start, end, ""))


def change_argument(code: Code, grammar: Grammar) -> Edit | None:
    """An argument added, or a positional one that must be named."""
    calls = calls_without(code, ast.Starred, ast.GeneratorExp)
    if not calls:
        return None
    call = grammar.rng.choice(calls)
    function, name = "".join(shown(code, call.func, grammar)), grammar.name()
    if call.args and grammar.rng.random() < 0.5:
        return name_arguments(code, grammar, call, function)
    return add_argument(code, grammar, call, function, name)


def calls_without(code: Code, *types: type[ast.AST]) -> list[ast.Call]:
    """Calls of functions that are named once, with no positional argument of these types."""
    calls = [c for c in code.calls if code.once(c.func)]
    return [c for c in calls if not any(isinstance(a, types) for a in c.args)]


def name_arguments(code: Code, grammar: Grammar, call: ast.Call, function: str) -> Edit:
    """The positional arguments from some place on are named: `run(a, b)` -> `run(a, key=b)`."""
    index = grammar.rng.randrange(len(call.args))
    words = [grammar.name() for _ in call.args[index:]]
    edits = [
        (*code.span(argument), f"{word}={code.text(argument)}")
        for argument, word in zip(call.args[index:], words, strict=True)
    ]
    note = say(
        grammar.rng,
        "positional",
        function=function,
        nth=["first", "second", "third", "fourth", "fifth"][min(index, 4)],
        keyword=words[0],
        keywords=" and ".join(f"`{word}`" for word in words),
    )
    return code.replace(*edits), note


def add_argument(
    code: Code, grammar: Grammar, call: ast.Call, function: str, name: str
) -> Edit | None:
    """A keyword argument `name` added at the end: `run(a)` -> `run(a, depth=3)`."""
    rng, (_, end) = grammar.rng, code.span(call)
    kinds = [grammar.string, grammar.number, lambda: rng.choice(["True", "False", "None"])]
    value = rng.choice(kinds)()
    if code.source[: end - 1].rstrip().endswith(","):
        return None
    comma = ", " if call.args or call.keywords else ""
    note = say(rng, "argument", function=function, keyword=name, value=value)
    return code.replace((end - 1, end - 1, f"{comma}{name}={value}")), note


def change_attribute(code: Code, grammar: Grammar) -> Edit | None:
    """An attribute that becomes a method, or the reverse: `data.size` <-> `data.size()`."""
    rng = grammar.rng
    reads, methods = plain_reads(code), bare_methods(code)
    if reads and (not methods or rng.random() < 0.5):
        node = rng.choice(reads)
        _, end = code.span(node)
        return code.replace((end, end, "()")), say_attribute(code, grammar, node, "method")
    if not methods:
        return None
    call = rng.choice(methods)
    (_, start), (_, end) = code.span(call.func), code.span(call)
    return code.replace((start, end, "")), say_attribute(code, grammar, call.func, "property")


def say_attribute(code: Code, grammar: Grammar, node: ast.Attribute, what: str) -> str:
    """A note that tells what the attribute at `node` became, a "method" or a "property"."""
    qualifier, name = shown(code, node, grammar)
    return say(grammar.rng, what, attribute=qualifier + name, name=name)


def plain_reads(code: Code) -> list[ast.Attribute]:
    """Attributes of objects that are read, not called: `size` of `data.size`, not of `np.size`."""
    called = {id(c.func) for c in code.calls}
    loads = [n for n in code.attributes if isinstance(n.ctx, ast.Load) and id(n) not in called]
    return [n for n in loads if code.text(n.value) not in code.modules and code.once(n)]


def bare_methods(code: Code) -> list[ast.Call]:
    """Method calls without arguments: `data.size()`."""
    calls = [c for c in code.calls if isinstance(c.func, ast.Attribute) and code.once(c.func)]
    return [c for c in calls if not c.args and not c.keywords]


# ---------------------------------------------------------------- forms of a call

# What stands in braces, by the example of `np.pad(a, b, mode=c)` or `frame.pad(a, b, mode=c)`:
#   {function}    the function as it is called: "np.pad", "frame.pad"
#   {receiver}    of a method, what it is called on: "frame"
#   {module}      with its dot the module that the function is called from: "np.", else ""
#   {arguments}   the positional arguments: "a, b"; {first} and {second} of them; {others}: ", b"
#   {keywords}    the keyword arguments, after a comma where others come before: ", mode=c"
#   {library}     some module that the program imports
#   {new} {other} {third}  names that come from the note
# A form that stands twice in a list is drawn twice as often.
CALL = "{function}({arguments}{keywords})"  # the old form
FORMS = [
    "{function}({arguments}{keywords}).{new}",
    "{function}({arguments}{keywords}).{new}()",
    "{function}.{new}({arguments}{keywords})",
    "{module}{new}.{other}({arguments}{keywords})",
    "{function}({arguments}{keywords})[0]",
    "{library}.{new}({function}({arguments}{keywords}))",
    "list({function}({arguments}{keywords}))",
]
METHOD_FORMS = [
    "{receiver}.{new}.{other}({arguments}{keywords})",
    "{receiver}.{new}().{other}({arguments}{keywords})",
    "{receiver}.{new}({arguments}{keywords}).{other}()",
] * 2
BARE_METHOD_FORMS = ["{library}.{new}({receiver})"]  # without positional arguments
FULL_METHOD_FORMS = [
    "{library}.{new}({receiver}, {arguments}{keywords})",
    "{new}({receiver}, {arguments}{keywords})",
    "{library}.{new}([{receiver}, {arguments}]{keywords})",
] * 2
ARGUMENT_FORMS = [  # with positional arguments, whatever their number
    "{function}([{arguments}]{keywords})",
    "{module}{new}({other}({first}){others}{keywords})",
    "{library}.{new}({arguments}{keywords})",
    "{module}{new}({arguments}{keywords}).{other}()",
]
ONE_ARGUMENT_FORMS = [
    "{function}({new}={first}{keywords})",
    "{first}.{new}()",
    "{first}.{new}",
    "{module}{new}({first}, {other}={library}.{third})",
]
MORE_ARGUMENTS_FORMS = ["{function}({arguments}{keywords})[{new}]"]
TWO_ARGUMENTS_FORMS = [
    "{first}.{new}({second}{keywords})",
    "{function}(({arguments}){keywords})",
    "{module}{new}({second}, {first}{keywords})",
    "{function}({first}, {new}={second}{keywords})",
]


def forms(method: bool, count: int) -> list[str]:
    """The forms that a call with `count` positional arguments can take."""
    some = list(FORMS)
    if method:
        some += METHOD_FORMS + (FULL_METHOD_FORMS if count else BARE_METHOD_FORMS)
    if count:
        some += ARGUMENT_FORMS + (ONE_ARGUMENT_FORMS if count == 1 else MORE_ARGUMENTS_FORMS)
    return some + TWO_ARGUMENTS_FORMS if count == 2 else some


def change_form(code: Code, grammar: Grammar) -> Edit | None:
    """A call written in another form: `run(a, b)` -> `a.run(b)`.

    The note shows both forms with the names of the program or, as often, with its own.
    """
    rng = grammar.rng
    calls = calls_without(code, ast.Starred)
    if not calls:
        return None
    call = rng.choice(calls)
    names = call_names(code, call)
    if len(names["receiver"]) > 30 or any(
        "\n" in names[key] for key in ("receiver", "arguments", "keywords")
    ):
        return None
    names |= {key: grammar.name() for key in ("new", "other", "third")}
    names["library"] = rng.choice(list(code.modules) or [grammar.name()[:2]])
    pattern = rng.choice(forms(is_method(names), len(call.args)))
    told = names | own_names(grammar, names, len(call.args)) if rng.random() < 0.5 else names
    if names["keywords"] and rng.random() < 0.7:
        told = told | {"keywords": ""}
    before, after = CALL.format(**told), pattern.format(**told)
    note = say(rng, "form", before=before, after=after, name=names["name"])
    return code.replace((*code.span(call), pattern.format(**names))), note


def call_names(code: Code, call: ast.Call) -> dict[str, str]:
    """The keys that the call itself fills, and as "name" the last name of its function."""
    arguments = [code.text(a) for a in call.args]
    keywords = [f"{word.arg}={code.text(word.value)}" for word in call.keywords if word.arg]
    dotted = isinstance(call.func, ast.Attribute)
    function = code.text(call.func)
    receiver = code.text(call.func.value) if dotted else ""
    return argument_names(arguments) | {
        "function": function,
        "name": call.func.attr if dotted else function,
        "receiver": receiver,
        "module": receiver + "." if receiver in code.modules else "",
        "keywords": "".join(", " + k for k in keywords) if arguments else ", ".join(keywords),
    }


def argument_names(arguments: list[str]) -> dict[str, str]:
    """The keys that positional arguments fill: of ["a", "b"] `second` is "b", `others` ", b"."""
    first_two = dict(zip(("first", "second"), arguments, strict=False))
    others = "".join(", " + a for a in arguments[1:])
    return first_two | {"arguments": ", ".join(arguments), "others": others}


def own_names(grammar: Grammar, names: dict[str, str], count: int) -> dict[str, str]:
    """The keys for which a note has names of its own: the `count` arguments and the receiver."""
    own = argument_names([grammar.name() for _ in range(count)])
    own["receiver"] = grammar.name()
    if is_method(names):
        own["function"] = f"{own['receiver']}.{names['name']}"
    return own


def is_method(names: dict[str, str]) -> bool:
    """Whether the call is one of an object's method, not of a module's function."""
    return bool(names["receiver"]) and not names["module"]


# ---------------------------------------------------------------- one update

# How often each kind is drawn, borrowed notes aside.
KINDS = {
    rename: 3,
    change_keyword: 14,
    change_argument: 2.5,
    change_attribute: 1,
    change_module: 3,
    move: 1.5,
    change_form: 8,
}
BORROWED = 6  # how often a real note is borrowed


def update(source: str, grammar: Grammar, borrowed: list[Rename]) -> Edit | None:
    """One made-up update of `source`, sometimes two; None where it leads nowhere."""
    rng = grammar.rng
    kinds = {functools.partial(borrow, borrowed=borrowed): BORROWED} | KINDS
    notes = []
    for _ in range(rng.choices([1, 2], [12, 1])[0]):
        (change,) = rng.choices(list(kinds), list(kinds.values()))
        edit = change(Code(source), grammar)
        if edit is None or edit[0] == source or not parses(edit[0]):
            return None
        source, note = edit
        notes.append(note)
    return source, " ".join(notes)
