"""Benchmarks: published formats, programs under test, Pass@k, and runs that stop and go on."""

import gzip
import itertools
import json
import math
import warnings

import pytest
from transformers import AutoTokenizer

import data
import evaluate
from sandbox import Box, benchmarks
from sandbox import passk as bench
from sandbox.passk import Result

# ---- items of our own, in the published formats -------------------------------------------------

GCD = {
    "description": "math.gcd takes a scale.",
    "rationale": "Tiles come in many sizes.",
    "docstring": "The result is multiplied by `scale`, 1 by default.",
    "signature": "math.gcd(a, b, scale=1)",
    "imports": ["import math", "old_gcd = math.gcd", "setattr(math, 'old_gcd', old_gcd)"],
    "implementation": "def gcd(a, b, scale=1):\n    return old_gcd(a, b) * scale\n",
    "update_type": "add-argument",
    "function_path": "math.gcd",
    "package": "math",
    "update_id": "[math.gcd]:[add-argument]:[update-0]",
}
RAVEL = {
    "description": "numpy.ravel is called numpy.flat.",
    "rationale": "Shorter.",
    "docstring": "As numpy.ravel was.",
    "signature": "numpy.flat(a)",
    "imports": ["import numpy", "import numpy as np", "old_ravel = numpy.ravel"],
    "implementation": "def flat(a):\n    return old_ravel(a)\n",
    "update_type": "modify-function-name",
    "function_path": "numpy.ravel",
    "package": "numpy",
    "update_id": "[numpy.ravel]:[modify-function-name]:[update-0]",
}
TILE = {
    "scenario": "You lay tiles.",
    "problem": "Return the largest square tile, `scale` times enlarged.",
    "solution_signature": "def tile(width: int, height: int, scale: int) -> int",
    "unit_tests": [
        "def test_tile():\n    # the largest square\n    result = tile(4, 6, 3)\n\n"
        "    assert result == math.gcd(4, 6, scale=3)\n    ",
        "def test_one():\n    assert tile(1, 1, 1) == 1",
    ],
    "imports": GCD["imports"],
    "ref_solution": "def tile(width: int, height: int, scale: int) -> int:\n"
    "    return math.gcd(width, height, scale=scale)\n",
    "prog_syn_id": "[math.gcd]:[add-argument]:[update-0]:[prog_syn-0]",
}
FLOOR = TILE | {
    "problem": "The same for a list of floors.",
    "solution_signature": "tiles(floors: List[Tuple[int, int]])",
    "unit_tests": ["def test_tiles():\n    assert tiles([(4, 6), (5, 5)]) == [2, 5]"],
    "ref_solution": "from typing import List, Tuple\ndef half(x): return x\n"
    "def tiles(floors: List[Tuple[int, int]]):\n"
    "    return [math.gcd(a, b, scale=1) for a, b in floors]\n",
    "prog_syn_id": "[math.gcd]:[add-argument]:[update-0]:[prog_syn-1]",
}
ROW = TILE | {
    "problem": "Write the table into `out` as one row, and return it.",
    "solution_signature": "def row(table, out)",
    "unit_tests": [
        "def test_row():\n    out = np.zeros(4)\n    result = row(np.eye(2), out)\n"
        "    assert np.array_equal(out, [1, 0, 0, 1]) and result.shape == (4,)"
    ],
    "imports": RAVEL["imports"],
    "ref_solution": "import numpy as np\ndef row(table, out):\n    out[:] = np.flat(table)\n"
    "    return out\n",
    "prog_syn_id": "[numpy.ravel]:[modify-function-name]:[update-0]:[prog_syn-0]",
}
GROUPED = [
    {"update": GCD, "prog_syn_examples": [TILE, FLOOR]},
    {"update": RAVEL, "prog_syn_examples": [ROW]},
]


def _joined(row: dict) -> dict:
    """Lists as one string each, as the later release has them."""
    glue = {"imports": "\n", "unit_tests": "\n\n"}
    return {key: glue[key].join(x) if isinstance(x, list) else x for key, x in row.items()}


UNGROUPED = [
    {"update": _joined(group["update"]), "update_id": group["update"]["update_id"]} | _joined(x)
    for group in GROUPED
    for x in group["prog_syn_examples"]
]
FLAT = [
    _joined(group["update"])
    | {key: x for key, x in _joined(example).items() if key != "imports"}
    | {"prog_syn_imports": "\n".join(example["imports"])}
    for group in GROUPED
    for example in group["prog_syn_examples"]
]

DOUBLE = {
    "task_id": "HumanEval/0",
    "prompt": "def half(x):\n    return x / 2\n\n\ndef double(x: int) -> int:\n"
    '    """ Twice x.\n    >>> double(2)\n    4\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
    "    assert half(candidate(3)) == 3\n",
}
ROOT = {  # the one test of HumanEval+ that cannot pass as published
    "task_id": "HumanEval/32",
    "prompt": 'def find_zero(xs: list):\n    """ A root of 1 + 2 x, and the like. """\n',
    "entry_point": "find_zero",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "test": "def _poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n"
    "def check(candidate):\n    for inp in [[[1, 2]], [[-3, 6]]]:\n"
    "        assert _poly(*candidate(*inp), inp) <= 0.0001\n",
}


def _write(path, rows: list) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [UNGROUPED, FLAT])
def test_both_releases_give_the_same_items(rows, tmp_path):
    """A reader of one release would refuse the other, or lose its tests."""
    grouped = benchmarks.read("codeupdatearena", _write(tmp_path / "grouped.jsonl", GROUPED))
    others = benchmarks.read("codeupdatearena", _write(tmp_path / "others.jsonl", rows))
    assert [item.id for item in grouped] == [x["prog_syn_id"] for x in (TILE, FLOOR, ROW)]
    assert grouped == others


def test_a_program_under_test_is_made_of_the_published_parts(tmp_path):
    """A test without its call would pass whatever the program does."""
    tile, floor, row = benchmarks.read("codeupdatearena", _write(tmp_path / "a.jsonl", GROUPED))
    imports = "import math\nold_gcd = math.gcd\nsetattr(math, 'old_gcd', old_gcd)\n"
    assert tile.setup == imports + GCD["implementation"] + "\nmath.gcd = gcd\n"
    assert tile.without == imports
    assert len(tile.tests) == 2 and tile.tests[1].endswith("\ntest_one()\n")
    assert "test_one" not in tile.tests[0]
    assert floor.tests[0].startswith("from typing import List, Tuple\n")  # as the program's own
    assert (tile.calls, floor.calls, row.calls) == (("tile",), ("tiles",), ("row",))
    assert (row.package, row.kind) == ("numpy", "modify-function-name")


@pytest.mark.parametrize(
    ("path", "kind", "code", "statement"),
    [
        ("a.f", "add-argument", "def f(x): 0", "a.f = f"),
        ("a.b.f", "modify-output-semantics", "def f(x): 0\ndef g(): 0", "a.b.f = f"),
        ("a.f", "modify-function-name", "def g(x): 0", "del a.f\nsetattr(a, 'g', g)"),
        ("a.f", "add-function", "def g(x): 0", "setattr(a, 'g', g)"),
        ("a.f", "deprecate-function", "", "del a.f"),
    ],
)
def test_each_kind_of_update_is_installed_in_its_way(path, kind, code, statement):
    """A renamed function that stays under its old name would pass old code with the update."""
    assert benchmarks.install(path, kind, code) == statement


def test_the_prompt_has_the_update_and_the_task_and_no_test(tmp_path):
    """A unit test in the prompt would give the answer away."""
    item = benchmarks.read("codeupdatearena", _write(tmp_path / "a.jsonl", GROUPED))[0]
    tokenizer = AutoTokenizer.from_pretrained(data.POLICY)
    prompt = tokenizer.decode(benchmarks.prompt(item, tokenizer, "think"))
    assert prompt.endswith(data.OPENING)
    shown = [data.SYSTEM, "math.gcd", GCD["description"], GCD["signature"], GCD["docstring"]]
    shown += [TILE["scenario"], TILE["problem"], TILE["solution_signature"], data.TASK]
    places = [prompt.index(text) for text in shown]
    assert places == sorted(places)
    assert "assert" not in prompt and "old_gcd" not in prompt


def test_humaneval_is_read_gzip_or_not_and_its_broken_test_is_mended(tmp_path):
    """The published HumanEval+/32 passes a number to `*`: no program could pass it."""
    plain = benchmarks.read("humaneval", _write(tmp_path / "a.jsonl", [DOUBLE, ROOT]))
    assert plain == benchmarks.read("humaneval", _write(tmp_path / "a.jsonl.gz", [DOUBLE, ROOT]))
    double, root = plain
    assert double.head == double.setup == DOUBLE["prompt"] and double.without is None
    assert double.tests[0].endswith("\ncheck(double)\n")
    assert "abs(_poly(*inp, candidate(*inp))) <= 0.0001" in root.tests[0]


def test_pandas_shares_a_process(tmp_path):
    """Tables do not cross to a judge: right programs would fail."""
    rows = [{"update": GCD | {"package": "pandas"}, "prog_syn_examples": [TILE]}]
    assert benchmarks.read("codeupdatearena", _write(tmp_path / "a.jsonl", rows))[0].calls == ()


BAD = [
    ("humaneval", DOUBLE | {"test": None}, "line 1: field 'test' is missing"),
    ("humaneval", DOUBLE | {"prompt": 3}, "line 1: field 'prompt' must be a string"),
    ("humaneval", DOUBLE | {"test": "def check(:"}, "field 'test' is not valid Python"),
    ("humaneval", [1], "line 1: not a JSON object but a list"),
    ("codeupdatearena", {"update": GCD | {"function_path": None}}, "'function_path' is missing"),
    ("codeupdatearena", {"update": 1}, "field 'update' must be an object"),
    ("codeupdatearena", DOUBLE, "field 'function_path' is missing"),
    ("codeupdatearena", {"update": GCD, "prog_syn_examples": [1]}, "must be a list of objects"),
    ("codeupdatearena", UNGROUPED[0] | {"unit_tests": "x = 1"}, "no function whose name starts"),
    ("codeupdatearena", {"update": GCD, "prog_syn_examples": [TILE, TILE]}, "a second time"),
]


@pytest.mark.parametrize(("benchmark", "row", "words"), BAD)
def test_a_bad_row_is_named_in_one_sentence(benchmark, row, words, tmp_path):
    """A KeyError would not tell which line of the file lacks what."""
    path = _write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        benchmarks.read(benchmark, path)
    assert words in str(error.value) and path in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"\xff{}", b"\x1f\x8b not gzip"])
def test_a_bad_file_is_named_in_one_sentence(content, tmp_path):
    """Half a download would end in a traceback."""
    (tmp_path / "bad.jsonl").write_bytes(content)
    for path in (tmp_path / "bad.jsonl", tmp_path / "missing.jsonl"):
        with pytest.raises(ValueError, match=f"^{path}[^\n]*$"):
            benchmarks.read("humaneval", path)


# ---- Pass@k -------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_choices_with_a_pass():
    """The biased estimate 1 - (1 - c/n)^k is too high."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert math.isclose(bench.pass_at_k(n, c, k), sum(map(any, choices)) / len(choices))
    assert bench.pass_at_k(5, 1, 1) == pytest.approx(1 / 5)
    assert bench.pass_at_k(5, 2, 2) == pytest.approx(1 - (3 * 2) / (5 * 4))
    for k in (0, 6):
        with pytest.raises(ValueError, match="needs at least"):
            bench.pass_at_k(5, 1, k)


def test_the_interval_is_that_of_items_drawn_anew():
    """An interval over samples instead of items would be too narrow."""
    assert bench.bootstrap([1.0] * 7) == bench.Estimate(1.0, 1.0, 1.0, 7)
    # A mean of 100 draws of 0 or 1, half each, has a deviation of 0.05: 0.5 -+ 1.96 * 0.05.
    s = bench.bootstrap([0.0, 1.0] * 50)
    assert s.mean == 0.5 and abs(s.low - 0.402) < 0.02 and abs(s.high - 0.598) < 0.02


RESULTS = [
    Result("a", "math", "add", ["pass", "pass", "fail"], ["", "", "x"], ["fail", "pass", ""]),
    Result("b", "math", "add", ["fail"] * 3, ["x"] * 3, [""] * 3),
    Result("c", "re", "name", ["pass", "could-not-run", "pass"], ["", "no re", ""], ["fail"] * 3),
    Result("d", "re", "name", ["pass"] + ["fail"] * 2, [""] * 3, ["could-not-run", "", ""]),
]


def test_what_could_not_run_is_left_out_and_upass_needs_the_update():
    """A missing library counted as wrong would measure the machine."""
    assert [bench.counts(r, False) for r in RESULTS] == [(3, 2), (3, 0), (2, 2), (3, 1)]
    assert [bench.counts(r, True) for r in RESULTS] == [(3, 1), (3, 0), (2, 2), (2, 0)]
    assert bench.values(RESULTS, 1) == pytest.approx({"a": 2 / 3, "b": 0, "c": 2 / 2, "d": 1 / 3})
    assert bench.values(RESULTS, 3) == {"a": 1, "b": 0, "d": 1}  # c is judged twice only
    update = bench.values(RESULTS, 1, True)
    assert update == pytest.approx({"a": 1 / 3, "b": 0, "c": 2 / 2, "d": 0 / 2})
    lines = bench.table(RESULTS, [1, 3]).splitlines()
    # Their means: (2/3 + 0 + 1 + 1/3) / 4, (1/3 + 0 + 1 + 0) / 4, and 2/3.
    assert [cell.split()[0] for cell in lines[2].split(" | ")[2:5]] == ["50.0", "33.3", "66.7"]
    assert bench.table(RESULTS, [4]).splitlines()[2] == "| all | 4 | - | - |"


def test_the_table_has_all_packages_and_kinds():
    """A mean over all packages would hide the one that fails."""
    lines = bench.table(RESULTS, [1, 3]).splitlines()
    assert lines[0] == "| | items | Pass@1 | UPass@1 | Pass@3 | UPass@3 |"
    assert [x.split(" | ")[0] for x in lines[2:]] == ["| all", "| math", "| re", "| add", "| name"]
    assert lines[3].startswith("| math | 2 | 33.3 [")  # (2/3 + 0) / 2
    assert "UPass" not in bench.table([Result("a", verdicts=["pass"], without=[""])], [1])


def test_code_in_another_form_fails_as_asked_and_counts_in_any_form(tmp_path):
    """Prevents: a chat model that scores 0 for its form, or a form that is not asked for paid."""
    verdicts, asked = ["pass", "pass", "fail", "could-not-run"], [True, False, False, False]
    r = Result("a", "math", "add", verdicts, [""] * 4, ["fail", "fail", "", ""], [], asked)
    # As asked: all four are judged, one passes. In any form: three are judged, two pass.
    assert bench.counts(r, False) == (4, 1) and bench.counts(r, False, asked=False) == (3, 2)
    lines = bench.table([r], [1], both=True).splitlines()
    assert lines[0] == "| | items | Pass@1 | UPass@1 | Pass@1, any form | UPass@1, any form |"
    cells = [f"{x} [{x}, {x}]" for x in ("25.0", "25.0", "66.7", "66.7")]
    assert lines[2] == f"| all | 1 | {' | '.join(cells)} |"
    (tmp_path / "a.jsonl").write_text(bench.line(r, "r"))
    assert bench.read_results(tmp_path / "a.jsonl", "r") == [r]


def test_a_file_of_before_any_form_still_reads(tmp_path):
    """Prevents: hours of judged samples refused for a field that they do not need."""
    row = json.loads(bench.line(RESULTS[0], "r"))
    del row["asked"]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert bench.read_results(tmp_path / "a.jsonl", "r") == RESULTS[:1]


# ---- the file of results ------------------------------------------------------------------------


def test_a_half_written_line_is_cut_off_and_the_rest_kept(tmp_path):
    """A run killed inside a line could not go on, or would join it to the next."""
    path = tmp_path / "out.jsonl"
    lines = [bench.line(result, "r") for result in RESULTS[:2]]
    path.write_text(lines[0] + lines[1] + lines[0][:20])
    assert bench.read_results(path, "r") == RESULTS[:2]
    assert path.read_text() == lines[0] + lines[1]
    assert bench.read_results(tmp_path / "none", "r") == []


@pytest.mark.parametrize("text", ['{"id": 1}\n', "[]\n", "no json\n", '{"run": "r"}\n'])
def test_a_file_that_holds_something_else_is_not_touched(text, tmp_path):
    """The results of another run, or notes of a person, would be lost."""
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="out.jsonl, line 1: no.*; give a new file$"):
        bench.read_results(path, "r")
    path.write_text(bench.line(RESULTS[0], "other"))
    with pytest.raises(ValueError, match="other data, samples or settings"):
        bench.read_results(path, "r")
    assert path.read_text() == bench.line(RESULTS[0], "other")


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    """Judging all again would take the hours that were spent already."""
    rows = [DOUBLE | {"task_id": str(n)} for n in range(3)]
    items = benchmarks.read("humaneval", _write(tmp_path / "a.jsonl", rows))
    out, asked = tmp_path / "out.jsonl", []
    monkeypatch.setattr(bench, "ROUND", 2)

    def sampler(part):
        asked.append([item.id for item in part])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [([item.reference], [True]) for item in part]

    with pytest.raises(KeyboardInterrupt):
        bench.run_items(items, sampler, Box(), out, "r")
    results = bench.run_items(items, sampler, Box(), out, "r")
    assert asked == [["0", "1"], ["2"], ["2"]]
    assert [r.id for r in results] == ["0", "1", "2"]
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == [*"012"]


# ---- from the command line ----------------------------------------------------------------------


def _main(tmp_path, benchmark, rows, samples, *flags) -> tuple[int, list[dict]]:
    out = tmp_path / "out.jsonl"
    named = samples if isinstance(samples, str) else _write(tmp_path / "samples.jsonl", samples)
    files = ["--data", _write(tmp_path / "data.jsonl", rows), "--predictions", named]
    code = evaluate.main([benchmark, *files, "--out", str(out), *flags])
    lines = out.read_text().splitlines() if out.exists() else []
    return code, sorted(map(json.loads, lines), key=lambda row: row["id"])


def test_reference_solutions_pass_with_the_update_and_not_without(tmp_path, capsys):
    """This is the check of the harness: where it fails, no other number means anything."""
    code, lines = _main(tmp_path, "codeupdatearena", GROUPED, "reference")
    assert code == 0
    assert [line["verdicts"] for line in lines] == [["pass"]] * 3
    # `tiles` calls gcd with a scale, so that it fails without the update, and so do the others.
    assert [line["without"] for line in lines] == [["fail"]] * 3
    assert "| all | 3 | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in capsys.readouterr().out


def test_answers_are_told_apart(tmp_path, capsys):
    """A harness that lets a cheat through, or an old solution count as a use of the update."""
    old = "import math\ndef tile(width, height, scale): return math.gcd(width, height) * scale"
    cheat = "class A:\n    def __eq__(self, other): return True\ndef tile(*a): return A()"
    codes = [TILE["ref_solution"], old, "def tile(*a): return 1", cheat, "import os; os._exit(0)"]
    samples = [{"id": TILE["prog_syn_id"], "code": code} for code in codes]
    # Without the update the tests themselves call gcd with a scale: nothing passes then.
    code, (line,) = _main(tmp_path, "codeupdatearena", GROUPED, samples, "--k", "1,5")
    assert code == 0
    assert line["verdicts"] == ["pass", "pass", "fail", "fail", "fail"]
    assert line["without"] == ["fail", "fail", "", "", ""]
    assert line["code"] == codes and line["reasons"][0] == "" and all(line["reasons"][2:])
    said = capsys.readouterr()
    assert "2 of 3 items have no sample" in said.err and "| all | 1 | 40.0 [" in said.out


def test_humaneval_in_its_own_format(tmp_path):
    """A completion continues the prompt; a whole function replaces it."""
    completions = ["    return x + x\n", "    return x\n", "def double(x):\n    return 2 * x\n"]
    samples = [{"task_id": "HumanEval/0", "completion": text} for text in completions]
    code, (line,) = _main(tmp_path, "humaneval", [DOUBLE, ROOT], samples)
    assert (code, line["verdicts"]) == (0, ["pass", "fail", "pass"])


def test_a_whole_program_is_a_humaneval_answer(tmp_path):
    """Behind the prompt `from __future__` is a syntax error, and its reason read "None"."""
    future = "from __future__ import annotations\n"
    whole = future + "def double(x: Foo) -> Foo:\n    return '\\d' and 2 * x\n"
    broken = ["    return x\n" + future, "    return (\n"]
    completions = [whole, "def double(x):\n  return 3 * x", *broken]
    samples = [{"task_id": "HumanEval/0", "completion": text} for text in completions]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, (line,) = _main(tmp_path, "humaneval", [DOUBLE, ROOT], samples)
    assert line["verdicts"] == ["pass", "fail", "fail", "fail"]
    said = line["reasons"]
    assert said[2].startswith("SyntaxError: from __future__ imports must occur at the beginning")
    assert "(<program>, line " in said[2] and "was never closed" in said[3]


def test_a_whole_program_has_the_names_of_its_prompt(tmp_path):
    """An answer that repeats the function, but not the prompt's import, was right and is."""
    row = DOUBLE | {"prompt": "from typing import List\n\n" + DOUBLE["prompt"]}
    code = "def double(x: List) -> List:\n    return 2 * x\n"
    samples = [{"task_id": "HumanEval/0", "completion": code}]
    _, (line,) = _main(tmp_path, "humaneval", [row], samples)
    assert line["verdicts"] == ["pass"]


def test_a_missing_library_is_said_and_not_counted(tmp_path, capsys):
    """Zero percent would be the machine's result, not the model's."""
    update = GCD | {"imports": [*GCD["imports"], "import no_such_library"]}
    rows = [{"update": update, "prog_syn_examples": [TILE]}, GROUPED[1]]
    code, lines = _main(tmp_path, "codeupdatearena", rows, "reference")
    assert [line["verdicts"] for line in lines] == [["could-not-run"], ["pass"]]
    said = capsys.readouterr()
    assert "1 of 2 items cannot be run" in said.err and "no_such_library" in said.err
    assert "1 samples could not be run and are left out" in said.out
    assert "| all | 2 | 100.0 [" in said.out


@pytest.mark.parametrize(
    ("samples", "flags", "words"),
    [
        ("reference", ["--python", "/no/such/python"], "no interpreter /no/such/python"),
        ("reference", ["--k", "2"], "the item with fewest samples has 1"),
        ("reference", ["--k", "one"], "give numbers such as 1,5"),
        ("reference", ["--sandbox", "docker"], "bwrap or plain"),
        ([{"task_id": "HumanEval/9", "completion": ""}], [], "has no item 'HumanEval/9'"),
        ([{"task_id": "HumanEval/0"}], [], "line 1: a prediction needs the text fields"),
        ([], [], "no prediction in it"),
        ("/no/such/file", [], "/no/such/file cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(samples, flags, words, tmp_path, capsys):
    """A traceback would hide what to do."""
    code, lines = _main(tmp_path, "humaneval", [DOUBLE], samples, *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (code, lines) == (2, []) and error.startswith("evaluate.py: ") and words in error


def test_verdicts_do_not_depend_on_the_order_of_the_run(tmp_path):
    """A test that left something behind would change the next one's verdict."""
    item = benchmarks.read("codeupdatearena", _write(tmp_path / "a.jsonl", GROUPED))[0]
    codes = [TILE["ref_solution"], "def tile(*a): return 1", None]
    for order in itertools.permutations(range(3)):
        result = bench.run_samples(item, [codes[i] for i in order], [], Box())
        assert [result.verdicts[order.index(i)] for i in range(3)] == ["pass", "fail", "fail"]


def test_libraries_are_those_that_the_benchmark_itself_imports(tmp_path):
    """An import in a program's code must not decide what the machine is asked for."""
    items = benchmarks.read("codeupdatearena", _write(tmp_path / "a.jsonl", GROUPED))
    assert [bench.libraries(item) for item in items] == [(), (), ("numpy",)]


class Speaker:
    """A policy whose every answer is this text. It keeps the prompts and how it was to sample."""

    dtype = "torch.float32"

    def __init__(self, text: str):
        self.text, self.tokenizer = text, AutoTokenizer.from_pretrained(data.POLICY)

    def sample(self, prompts, *, group_size, **how):
        self.asked, self.how = [self.tokenizer.decode(ids) for ids in prompts], how
        return len(prompts) * group_size

    def texts(self, count):
        return [self.text] * count


FENCED = "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles."


def test_humaneval_is_asked_plainly_and_greedily(tmp_path, capsys, monkeypatch):
    """Prevents: a chat model measured in a form it was never taught; luck in a single sample."""
    speaker = Speaker(FENCED)
    monkeypatch.setattr(evaluate, "load", lambda *_: speaker)
    command = ["humaneval", "--data", _write(tmp_path / "a.jsonl", [DOUBLE]), "--n", "1"]
    assert evaluate.main(command) == 0
    shown = capsys.readouterr().out
    assert "| all | 1 | 100.0 [100.0, 100.0] |" in shown and "any form" not in shown
    turns = [{"role": "user", "content": "QUESTION"}]
    template = speaker.tokenizer.apply_chat_template
    head, tail = template(turns, add_generation_prompt=True, tokenize=False).split("QUESTION")
    (prompt,) = speaker.asked
    assert prompt.startswith(head) and prompt.endswith(tail)  # nothing but the template's own
    assert "def double(x: int) -> int:" in prompt and "think" not in prompt
    assert speaker.how["temperature"] == 0 and speaker.how["max_new_tokens"] == 768


def test_the_papers_form_is_scored_both_ways(tmp_path, capsys, monkeypatch):
    """Prevents: an untouched model's 0 % for its form taken for what it cannot do."""
    speaker = Speaker(FENCED)
    monkeypatch.setattr(evaluate, "load", lambda *_: speaker)
    command = ["humaneval", "--data", _write(tmp_path / "a.jsonl", [DOUBLE]), "--ask", "think"]
    assert evaluate.main([*command, "--n", "2"]) == 0
    assert "| all | 1 | 0.0 [0.0, 0.0] | 100.0 [100.0, 100.0] |" in capsys.readouterr().out
    assert speaker.asked[0].endswith("<think>") and speaker.how["temperature"] == 0.8
    speaker.text = f"so</think><answer>\n{FENCED}\n</answer>"  # the asked form
    assert evaluate.main(command) == 0
    assert speaker.asked[0].count("double") and "| all | 1 | 100.0 [" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text(json.dumps(GROUPED[0]))
    command = ["codeupdatearena", "--data", str(tmp_path / "a.jsonl"), "--n", "1"]
    assert evaluate.main(command) == 0
    head = "| | items | Pass@1 | UPass@1 | Pass@1, any form | UPass@1, any form |"
    assert head in capsys.readouterr().out and speaker.asked[0].endswith("<think>")


def test_a_models_own_samples_are_drawn_again_alike(tiny, tmp_path, capsys):
    """Prevents: a run that goes on with other samples than it would have drawn, or none at all."""
    data_file = tmp_path / "items.jsonl"
    data_file.write_text("".join(json.dumps(row) + "\n" for row in [DOUBLE, ROOT]))
    command = ["humaneval", "--data", str(data_file), "--model", str(tiny), "--device", "cpu"]
    command += ["--n", "2", "--k", "1,2", "--max-new-tokens", "3", "--temperature", "1"]
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for out in outs:
        assert evaluate.main([*command, "--out", str(out)]) == 0
        assert "| all | 2 | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] |" in capsys.readouterr().out
    a, b = ([json.loads(line) for line in out.read_text().splitlines()] for out in outs)
    assert sorted(a, key=str) == sorted(b, key=str)
    assert all(row["verdicts"] == ["fail", "fail"] for row in a)
    assert evaluate.main([*command, "--top-p", "0"]) == 2
    assert "top_p is 0.0" in capsys.readouterr().err
