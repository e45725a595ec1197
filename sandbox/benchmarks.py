"""Published benchmarks as one list of items: CodeUpdateArena, HumanEval and HumanEval+.

    read("codeupdatearena", "arena.jsonl")   -> [Item, ...]
    read("humaneval", "HumanEval.jsonl.gz")  -> [Item, ...]

The files are read as they are published, JSON lines, gzip or not. CodeUpdateArena
(arXiv 2407.06249) comes grouped, one update a line with its `prog_syn_examples`, or ungrouped, one
item a line; its lists may be joined to one string. HumanEval: arXiv 2107.03374; HumanEval+ in the
same format: arXiv 2305.01210.

Not here: how programs are run (`__init__.py`) and what their verdicts add up to (`passk.py`).
"""

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import data

NAMES = ("codeupdatearena", "humaneval")
PLAIN = "Answer with the whole program, its imports included, in one ```python fence."


@dataclass(frozen=True)
class Item:
    """One problem. What is tested is `setup`, then `program` of the code, then one of `tests`."""

    id: str
    user: str  # what the model is asked
    reference: str  # the benchmark's own solution, in the form of an answer
    tests: tuple[str, ...]  # trusted code; each is run in a process of its own
    calls: tuple[str, ...]  # the names that the tests take from the program; (): see `_calls`
    setup: str = ""  # trusted code before the program: the update, where there is one
    without: str | None = None  # `setup` without the update; None: there is no update
    head: str = ""  # HumanEval's answers continue this, or have it in themselves
    inout: bool = False  # tests look at arguments that the program writes into
    package: str = ""
    kind: str = ""  # of the update, as the benchmark names it


def read(name: str, path: str | Path) -> list[Item]:
    """Every item of a benchmark's file. ValueError names file, line and field of a fault."""
    make = {"codeupdatearena": _arena, "humaneval": _humaneval}[name]
    items: dict[str, Item] = {}
    for where, row in data.json_lines(path):
        for item in make(row, where):
            if item.id in items:
                raise ValueError(f"{where}: the id '{item.id}' stands in the file a second time")
            items[item.id] = item
    if not items:
        raise ValueError(f"{path}: no item in it; give the benchmark's JSON-lines file with --data")
    return list(items.values())


def messages(item: Item) -> list[dict[str, str]]:
    """The paper's conversation: the system turn and the way to answer are those of training."""
    user = f"{item.user}\n{data.TASK}"
    return [{"role": "system", "content": data.SYSTEM}, {"role": "user", "content": user}]


def prompt(item: Item, tokenizer, ask: str) -> list[int]:
    """Token ids of an item's prompt, as `ask` says: "think", the paper's form, or "plain".

    Plain is how a chat model is asked by anybody: no system turn but the template's own, and the
    answer's turn is opened by the template alone.
    """
    if ask == "think":
        return data.opened(messages(item), tokenizer)
    return data.opened([{"role": "user", "content": f"{PLAIN}\n{item.user}"}], tokenizer, "")


def _text(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        raise ValueError(f"{where}: field '{name}' is missing")
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{name}' must be a string")
    return value


def _code(row: dict, name: str, where: str) -> str:
    """A field of Python code; lists come joined to one string."""
    value = row.get(name)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        row = {name: "\n\n".join(value) if name == "unit_tests" else "\n".join(value)}
    code = _text(row, name, where)
    _parse(code, name, where)
    return code


def _parse(code: str, name: str, where: str) -> ast.Module:
    try:
        return data.parsed(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: field '{name}' is not valid Python ({error})") from None


LONG = 2**16  # characters: Python 3.10 dies of a sum of many more terms, here and not in a sandbox


def program(item: Item, code: str) -> str:
    """What is run: the code behind the item's head, or alone if it is a whole program by itself.

    The names of the head are there in either case: it is the item's setup, too.
    """
    if len(code) <= LONG:
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            body = data.parsed(code).body
            if any(isinstance(x, ast.FunctionDef) and x.name in item.calls for x in body):
                return code
    return item.head + code


# ---- HumanEval ----------------------------------------------------------------------------------

# HumanEval+ as published tests one problem by `_poly(*candidate(*inp), inp)`, which no number that
# a program returns can pass: coefficients and root have changed places.
SWAPPED = "_poly(*candidate(*inp), inp) <="
MENDED = "abs(_poly(*inp, candidate(*inp))) <="


def _humaneval(row: dict, where: str) -> Iterator[Item]:
    """One row of HumanEval or HumanEval+. The program continues the prompt."""
    head, name = _code(row, "prompt", where), _text(row, "entry_point", where)
    test = _code(row, "test", where).replace(SWAPPED, MENDED)
    solution = _text(row, "canonical_solution", where)
    user = f"Complete the function `{name}`.\n```python\n{head.strip(chr(10))}\n```"
    yield Item(
        id=_text(row, "task_id", where),
        user=user,
        reference=solution,
        tests=(f"{test}\n\ncheck({name})\n",),
        calls=(name,),
        setup=head,  # some tests use the helpers that a prompt defines
        head=head,
    )


# ---- CodeUpdateArena ----------------------------------------------------------------------------


def _arena(row: dict, where: str) -> Iterator[Item]:
    """The items of one row: many where it has `prog_syn_examples`, else one."""
    update = row.get("update", row)  # the flattest form has the update's fields beside the item's
    if not isinstance(update, dict):
        raise ValueError(f"{where}: field 'update' must be an object")
    examples = row.get("prog_syn_examples", [row])
    if not isinstance(examples, list) or not all(isinstance(x, dict) for x in examples):
        raise ValueError(f"{where}: field 'prog_syn_examples' must be a list of objects")
    for example in examples:
        yield _arena_item(update, example, where)


def _arena_item(update: dict, example: dict, where: str) -> Item:
    path, kind = _text(update, "function_path", where), _text(update, "update_type", where)
    own = "prog_syn_imports" if "prog_syn_imports" in example else "imports"
    imports, mine = _code(update, "imports", where), _code(example, own, where)
    imports = imports if imports == mine else f"{imports}\n{mine}"
    new = _code(update, "implementation", where)
    package = _text(update, "package", where)
    reference = _code(example, "ref_solution", where)
    tests = _unit_tests(_code(example, "unit_tests", where), reference, where)
    return Item(
        id=_text(example, "prog_syn_id", where),
        user=_arena_prompt(update, example, where),
        reference=reference,
        tests=tests,
        calls=_calls(package, _text(example, "solution_signature", where), reference),
        setup=f"{imports}\n{new}\n{install(path, kind, new)}\n",
        without=imports + "\n",
        inout=True,
        package=package,
        kind=kind,
    )


def install(path: str, kind: str, implementation: str) -> str:
    """The statement that puts the new function in its place.

    >>> install("math.sin", "add-argument", "def sin(x, unit): ...")
    'math.sin = sin'
    """
    home, _, old = path.rpartition(".")
    defined = [x.name for x in data.parsed(implementation).body if isinstance(x, ast.FunctionDef)]
    new = old if old in defined or not defined else defined[-1]
    if "deprecat" in kind:
        return f"del {path}"
    if new == old:
        return f"{path} = {old}"
    keep = "" if kind == "add-function" else f"del {path}\n"
    return f"{keep}setattr({home}, {new!r}, {new})"


def _arena_prompt(update: dict, example: dict, where: str) -> str:
    """The paper's prompt: the update, then the task; no unit test."""
    fields = ("function_path", "description", "signature", "docstring")
    path, description, signature, docstring = (_text(update, f, where) for f in fields)
    scenario, problem, solution = (
        _text(example, f, where) for f in ("scenario", "problem", "solution_signature")
    )
    return (
        f"{path} has been updated.\n<doc>\n{description}\n"
        f"{signature}\n{docstring}\n</doc>\n{scenario}\n{problem}\n"
        f"Write the function, and use the update.\n```python\n{solution}\n```"
    )


def _calls(package: str, signature: str, reference: str) -> tuple[str, ...]:
    """The functions that the tests call: the one of the signature, else all of the reference.

    None for pandas, whose tables do not cross to a judge: test and program share a process there.
    """
    if package == "pandas":
        return ()
    defined = [x.name for x in data.parsed(reference).body if isinstance(x, ast.FunctionDef)]
    named = re.findall(r"\w+(?=\s*\()", signature)[:1]
    return tuple(named if named and named[0] in defined else defined)


def _unit_tests(text: str, reference: str, where: str) -> tuple[str, ...]:
    """Each test function with what stands before all of them, and its call.

    Published tests use names that the program imports: the imports of the reference come first.
    """
    body = _parse(text, "unit_tests", where).body
    imports = [x for x in data.parsed(reference).body if isinstance(x, ast.Import | ast.ImportFrom)]
    shared = [ast.unparse(x) for x in [*imports, *body] if not _is_test(x)]
    tests = [x for x in body if _is_test(x)]
    if not tests:
        raise ValueError(f"{where}: field 'unit_tests' has no function whose name starts with test")
    lines = text.splitlines()
    sources = ["\n".join(lines[x.lineno - 1 : x.end_lineno]) for x in tests]
    calls = [f"{x.name}()" for x in tests]
    return tuple(
        "\n".join([*shared, source, call]) + "\n"
        for source, call in zip(sources, calls, strict=True)
    )


def _is_test(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test")
