"""Published benchmarks as one list of items: CodeUpdateArena, HumanEval and HumanEval+.

    read("codeupdatearena", "arena.jsonl")   -> [Item, ...]

The files are read as they are published, JSON lines, gzip or not. CodeUpdateArena
(arXiv 2407.06249) comes grouped, one update a line with its `prog_syn_examples`, or ungrouped, one
item a line; its lists may be joined to one string. HumanEval: arXiv 2107.03374; HumanEval+ in the
same format: arXiv 2305.01210.
"""

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import data

PLAIN = "Answer with the whole program, its imports included, in one ```python fence."
NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises
LONG = 2**16  # characters: Python 3.10 dies of a sum of many more terms, here and not in a sandbox


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


def prompt(item: Item, tokenizer, ask: str) -> list[int]:
    """Token ids of an item's prompt. `ask` is "think", the paper's form, or "plain", as anybody
    asks a chat model: no system turn and no opening of the answer but the template's own."""
    if ask == "plain":
        return data.opened([{"role": "user", "content": f"{PLAIN}\n{item.user}"}], tokenizer, "")
    turns = {"system": data.SYSTEM, "user": f"{item.user}\n{data.TASK}"}  # as in training
    return data.opened([{"role": who, "content": x} for who, x in turns.items()], tokenizer)


def program(item: Item, code: str) -> str:
    """What is run: the code behind the item's head, or alone if it is a whole program by itself."""
    with suppress(*NO_PYTHON):
        if len(code) <= LONG and any(x.name in item.calls for x in _functions(code)):
            return code
    return item.head + code


def _functions(code: str) -> list[ast.FunctionDef]:
    return [x for x in data.parsed(code).body if isinstance(x, ast.FunctionDef)]


def _fields(row: dict, where: str, texts: str, codes: str) -> dict[str, str]:
    """The fields of these names: texts, and Python code, which may come as a list of strings."""
    found = {}
    for name in f"{texts} {codes}".split():
        value, code = row.get(name), name in codes.split()
        if value is None:
            raise ValueError(f"{where}: field '{name}' is missing")
        if code and isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            raise ValueError(f"{where}: field '{name}' must be a string")
        try:
            if code:
                data.parsed(value)
        except NO_PYTHON as error:
            raise ValueError(f"{where}: field '{name}' is not valid Python ({error})") from None
        found[name] = value
    return found


# ---- HumanEval ----------------------------------------------------------------------------------

# HumanEval+ as published tests one problem by `_poly(*candidate(*inp), inp)`, which no number that
# a program returns can pass: coefficients and root have changed places.
SWAPPED = "_poly(*candidate(*inp), inp) <="
MENDED = "abs(_poly(*inp, candidate(*inp))) <="


def _humaneval(row: dict, where: str) -> Iterator[Item]:
    """One row of HumanEval or HumanEval+. The program continues the prompt."""
    row = _fields(row, where, "task_id entry_point canonical_solution", "prompt test")
    head, name, test = row["prompt"], row["entry_point"], row["test"].replace(SWAPPED, MENDED)
    yield Item(
        id=row["task_id"],
        user=f"Complete the function `{name}`.\n```python\n{head.strip(chr(10))}\n```",
        reference=row["canonical_solution"],
        tests=(f"{test}\n\ncheck({name})\n",),
        calls=(name,),
        setup=head,  # some tests use the helpers that a prompt defines
        head=head,
    )


# ---- CodeUpdateArena ----------------------------------------------------------------------------

UPDATE = "function_path update_type package description signature docstring"
EXAMPLE = "prog_syn_id scenario problem solution_signature"


def _arena(row: dict, where: str) -> Iterator[Item]:
    """The items of one row: many where it has `prog_syn_examples`, else one."""
    update = row.get("update", row)  # the flattest form has the update's fields beside the item's
    if not isinstance(update, dict):
        raise ValueError(f"{where}: field 'update' must be an object")
    examples = row.get("prog_syn_examples", [row])
    if not isinstance(examples, list) or not all(isinstance(x, dict) for x in examples):
        raise ValueError(f"{where}: field 'prog_syn_examples' must be a list of objects")
    update = _fields(update, where, UPDATE, "imports implementation")
    path, kind, new = update["function_path"], update["update_type"], update["implementation"]
    for example in examples:
        own = "prog_syn_imports" if "prog_syn_imports" in example else "imports"
        example = _fields(example, where, EXAMPLE, f"{own} ref_solution unit_tests")
        imports = "\n".join(dict.fromkeys([update["imports"], example[own]]))
        reference, signature = example["ref_solution"], example["solution_signature"]
        yield Item(
            id=example["prog_syn_id"],
            user=(  # the paper's prompt: the update, then the task; no unit test
                f"{path} has been updated.\n<doc>\n{update['description']}\n"
                f"{update['signature']}\n{update['docstring']}\n</doc>\n"
                f"{example['scenario']}\n{example['problem']}\n"
                f"Write the function, and use the update.\n```python\n{signature}\n```"
            ),
            reference=reference,
            tests=_unit_tests(example["unit_tests"], reference, where),
            calls=_calls(update["package"], signature, reference),
            setup=f"{imports}\n{new}\n{install(path, kind, new)}\n",
            without=imports + "\n",
            inout=True,
            package=update["package"],
            kind=kind,
        )


def install(path: str, kind: str, implementation: str) -> str:
    """The statement that puts the new function in its place, such as `math.sin = sin`."""
    home, _, old = path.rpartition(".")
    defined = [x.name for x in _functions(implementation)]
    if "deprecat" in kind:
        return f"del {path}"
    if old in defined or not defined:
        return f"{path} = {old}"
    keep = "" if kind == "add-function" else f"del {path}\n"
    return f"{keep}setattr({home}, {defined[-1]!r}, {defined[-1]})"


def _calls(package: str, signature: str, reference: str) -> tuple[str, ...]:
    """The functions that the tests call: the one of the signature, else all of the reference.

    None for pandas, whose tables do not cross to a judge: test and program share a process there.
    """
    if package == "pandas":
        return ()
    defined = [x.name for x in _functions(reference)]
    named = re.findall(r"\w+(?=\s*\()", signature)[:1]
    return tuple(named if named and named[0] in defined else defined)


def _unit_tests(text: str, reference: str, where: str) -> tuple[str, ...]:
    """Each test function with what stands outside of all of them, and its call."""
    tests = [x for x in _functions(text) if x.name.startswith("test")]
    if not tests:
        raise ValueError(f"{where}: field 'unit_tests' has no function whose name starts with test")
    names = {x.name for x in tests}
    # Published tests use names that the program imports.
    imports = [x for x in data.parsed(reference).body if isinstance(x, ast.Import | ast.ImportFrom)]
    others = [x for x in data.parsed(text).body if getattr(x, "name", "") not in names]
    shared = "".join(ast.unparse(x) + "\n" for x in [*imports, *others])
    sources = [ast.get_source_segment(text, x) for x in tests]
    return tuple(f"{shared}{s}\n{x.name}()\n" for s, x in zip(sources, tests, strict=True))
