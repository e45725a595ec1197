"""sandbox/rows.py: answers judged by running them, here with the interpreter of the tests."""

import contextlib
import importlib
import json
import sys
from dataclasses import asdict, replace

import pytest

import data
import evaluate
import sandbox
from sandbox import guard
from sandbox import rows as execute

verify = pytest.importorskip("data.verify")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux alone")

RELEASE = ("Python 3.x",)
RIGHT, UNKNOWN = execute.Outcome("right"), "could-not-run"


def example(new: str, old: str = "print(old())", name: str = "row-0") -> data.Example:
    fields = ("python", "==3.x", "It is renamed.", "`old` is now `new`.", old, new)
    return data.Example(*fields, id=name, split="test")


@pytest.fixture
def here(monkeypatch):
    """Every row is about the release that the tests run in."""

    def releases(examples):
        return {
            e: verify.Row(e.id, e.dependency, e.old_code, e.new_code, RELEASE, RELEASE)
            for e in examples
        }

    @contextlib.contextmanager
    def interpreter(release, envs=""):
        yield sys.executable, ""

    monkeypatch.setattr(execute, "releases", releases)
    monkeypatch.setattr(execute, "interpreter", interpreter)


def judged(new: str, *codes: str | None, old: str = "print(old())") -> list[execute.Outcome]:
    return execute.outcomes([(example(new, old), code) for code in codes])


def test_what_is_right_and_what_is_wrong(here):
    """Prevents: another spelling of the true code taken for wrong, or a fault for right."""
    codes = {
        "print(1 +  1)": "",
        "print(4 // 2)": "",
        "print(3)": "it prints otherwise",
        "print(2); print()": "it prints otherwise",
        "print(2); x": "NameError: name 'x' is not defined",
        "print(2": "SyntaxError: '(' was never closed (<program>, line 1)",
        None: "the answer holds no code",
    }
    found = judged("print(2)", *codes)
    assert [o.reason for o in found] == list(codes.values())
    assert [o.run for o in found] == ["right"] * 2 + ["wrong"] * 5


WARN = "import warnings\nwarnings.warn('zebra', {})\nprint(2)"
THEIRS = "import warnings\nwarnings.warn_explicit('{} is going', FutureWarning, 'lib.py', 1)\n"


def test_a_deprecation_of_its_own_is_wrong(here):
    """Prevents: an answer that keeps the deprecated call is right since it still prints the same,
    or one is wrong for a warning that is about nothing in it."""
    kinds = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserWarning")
    found = judged("print(2)", *map(WARN.format, kinds))
    assert [o.reason for o in found] == [f"it warns: {kind}" for kind in kinds[:3]] + [""]
    about_a_word = THEIRS.format("zebra") + "print(2)"  # one that stands in its own, changed line
    about_nothing = THEIRS.replace("{} is going", "ze' + 'bra") + "print(2)"
    found = judged("import warnings\nprint(2)", about_a_word, about_nothing)
    assert [o.run for o in found] == ["wrong", "right"]
    shared = THEIRS.format("zebra")
    assert judged(shared + "print(2)", shared + "print( 2)") == [RIGHT]  # so does the true code


def test_warnings_change_nothing_in_the_program(here):
    """Prevents: a deprecation raised as an error, which the program's own `except` swallows."""
    code = "import warnings\ntry:\n    warnings.warn('x', DeprecationWarning)\nexcept Exception:\n"
    assert (
        judged("print(2)", code + "    pass\nprint(2)")[0].reason == "it warns: DeprecationWarning"
    )


def test_standard_output_alone_is_compared_and_all_of_it(here):
    """Prevents: a log with the time in it told apart, or a difference behind the first 4096 bytes
    overlooked, or a program under `__main__` that prints nothing on either side."""
    log = "import sys\nprint('12:00', file=sys.stderr)\n"
    assert judged("print(2)", log + "print(2)") == [RIGHT]
    true = "if __name__ == '__main__':\n    print('x' * 5000, {})".format
    assert [o.run for o in judged(true(2), true("+2"), true(3))] == ["right", "wrong"]
    own = "print(len(open(__file__).readlines()), {})"  # it is there, as where rows are proved
    assert judged(own.format(2), own.format("+2")) == [RIGHT]
    endless = "for _ in range(20000):\n    print('x' * 100)"  # 2 MB
    assert "prints more than" in judged("print(2)", endless)[0].reason


def test_what_cannot_run_is_not_wrong(here, monkeypatch):
    """Prevents: a library that cannot be had counted against the answer."""
    (broken,) = judged("import no_such_library", "print(2)")
    assert broken.run == UNKNOWN and "the true code does not run" in broken.reason
    nowhere = contextlib.nullcontext(("/no/bin/python", ""))
    monkeypatch.setattr(execute, "interpreter", lambda release, envs: nowhere)
    (missing,) = judged("print(2)", "print(2)")
    assert missing.run == UNKNOWN and missing.reason.endswith("no interpreter ENV/bin/python")
    fault = contextlib.nullcontext(("/no/bin/python", "Python 2.0 is not installed: no Python 2.0"))
    monkeypatch.setattr(execute, "interpreter", lambda release, envs: fault)
    assert judged("print(2)", "print(2)", None) == [
        execute.Outcome(UNKNOWN, "Python 2.0 is not installed: no Python 2.0"),
        execute.NO_CODE,
    ]


HEAD = "import math\nvalues = [3, 1, 2]\n"
LAST = "print(math.fsum(values), max(values, key=lambda x: x), sum(values, start=0))"
GONE = LAST.replace("fsum", "total")
SILENT = "import warnings\nwarnings.simplefilter('ignore')\nwarnings.warn('x', FutureWarning)\n"
LESS = "it leaves work out: it has fewer calls and operators than the old and the true code"
OTHER = "on other inputs it prints otherwise"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print(6.0, 3, 6)", LESS),
        (HEAD + LAST.replace("math.fsum(values)", "6.0"), LESS),
        (HEAD + LAST.replace("math.fsum(values)", "float(6)"), OTHER),
        (f"{HEAD}later = lambda: {GONE}\nprint(6.0, 3, 6)", OTHER),
        ("print(float(6), max(3, 3), sum([6], start=0))", OTHER),
        (
            f"{HEAD}try:\n    {GONE}\nexcept Exception:\n    print(6.0, 3, 6)",
            "it hides errors: try",
        ),
        (
            f"import contextlib\n{HEAD}with contextlib.suppress(Exception):\n    {GONE}\n{LAST}",
            "it hides errors: suppress",
        ),
        (SILENT + HEAD + LAST, "it hides errors: simplefilter"),
        (f"{HEAD}_deprecations = []\n{LAST}", "it hides errors: _deprecations"),
    ],
)
def test_an_answer_without_the_work_is_wrong(here, code, reason):
    """Prevents: a constant, a caught error, a silenced warning or a call that is gone is right."""
    assert judged(HEAD + LAST, code, old=HEAD + GONE) == [execute.Outcome("wrong", reason)]


@pytest.mark.parametrize(
    "code",
    [
        HEAD.replace("import math", "from math import fsum as add")
        + LAST.replace("math.fsum", "add"),
        HEAD + "total = math.fsum(values)\n" + LAST.replace("math.fsum(values)", "total"),
        HEAD + LAST.replace("math.fsum(values)", "float(sum(values))"),
        HEAD + LAST.replace(", start=0", ""),
        HEAD + LAST.replace("start=", ""),
    ],
)
def test_other_forms_of_the_work_are_right(here, code):
    """Prevents: an alias, a default that is left out or another way to the result is wrong."""
    assert judged(HEAD + LAST, code, old=HEAD + GONE) == [RIGHT]


def test_a_try_of_the_program_may_stay(here):
    """Prevents: a program that catches an error of its own cannot be migrated."""
    code = "try:\n    print(int('x'))\nexcept ValueError:\n    print({})"
    assert judged(code.format("abs(-3)"), code.format("abs(- 3)"), old=code.format("x(-3)")) == [
        RIGHT
    ]


def test_what_varies_by_itself_tells_nothing(here):
    """Prevents: a right answer is wrong since on another input the program prints a random name."""
    new = "import os\nx = 3\nprint(x if x < 3.5 else os.urandom(8), {})"
    assert judged(new.format("abs(1)"), new.format("abs( 1)"), old=new.format("x(1)")) == [RIGHT]


def test_variations_by_hand():
    """Prevents: another thing changed in the answer than in the true code, or what the update
    itself is about, or what an answer may leave out."""
    old, new = "f(1, 'a', 2.0, old=4, k=5, v='1-9 b')", "f(1, 'a', 2.0, new=6, k=5, v='1-9 b')"
    assert [code for code, _ in guard.variations(old, new, new)] == [
        "f(2, 'a', 2.0, new=6, k=5, v='1-9 b')",
        "f(1, 'ax', 2.0, new=6, k=5, v='1-9 b')",
        "f(1, 'a', 3.0, new=6, k=5, v='1-9 b')",
        "f(1, 'a', 2.0, new=6, k=6, v='1-9 b')",
        "f(1, 'a', 2.0, new=6, k=5, v='1-0 b')",
    ]
    assert list(map(guard.changed, ("a[b]", "", ", ", "día!", "v2.9-rc"))) == [
        "a[bx]", "", ", ", "díax!", "v2.0-rc"
    ]  # fmt: skip
    found = list(guard.variations(old, new, "g(True, axis=1.0, new=6, v='1-9 b')"))
    assert [code for _, code in found] == ["g(True, axis=1.0, new=6, v='1-9 b')"] * 3 + [
        "g(True, axis=1.0, new=6, v='1-0 b')"
    ]  # 1, 'a' and 2.0 are lost, k may be left out


def test_equal_answers_of_a_row_run_once(here, monkeypatch):
    """Prevents: hours for samples that are all alike."""
    ran, real = [], sandbox.run_all

    def spy(tasks, box):
        return real((ran.append(task.program) or task for task in tasks), box)

    monkeypatch.setattr(sandbox, "run_all", spy)
    assert judged("print(2)", "print( 2)", "print(3)", "print( 2)")[::2] == [RIGHT, RIGHT]
    assert ran == ["print(2)", "print( 2)", "print(3)"]


def test_rows_are_known_by_id_and_code():
    """Prevents: the release of a bundled row taken for another row that has its id by chance."""
    own = next(e for e in data.load(split="test_hard") if e.dependency == "msgpack")
    other, foreign = replace(own, new_code="print(2)"), replace(own, id="nowhere-0")
    found = execute.releases([own])
    assert list(found) == [own] and found[own].new_release[0].startswith("Python 3")
    assert execute.releases([other]) == execute.releases([foreign]) == {}
    (unknown,) = execute.outcomes([(foreign, "print(2)")])
    assert unknown.run == UNKNOWN and "release is not known" in unknown.reason


def test_what_is_missing_is_asked_for_in_one_sentence(monkeypatch, tmp_path):
    """Prevents: a traceback for uv or pyyaml, which training does not need."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="pip install uv"), execute.interpreter(RELEASE):
        pass
    folder = tmp_path / verify.digest(*RELEASE)
    folder.mkdir()
    (folder / "complete").touch()
    with execute.interpreter(RELEASE, str(tmp_path)) as found:  # made before: it needs no uv
        assert found == (str(folder / "bin" / "python"), "")
    assert folder.exists()
    monkeypatch.setitem(sys.modules, "yaml", None)
    for room, name in ((data, "verify"), (data, "build"), (sandbox, "rows")):
        monkeypatch.delitem(sys.modules, f"{room.__name__}.{name}")
        monkeypatch.delattr(room, name)
    with pytest.raises(ValueError, match="--run needs yaml: pip install pyyaml uv"):
        importlib.import_module("sandbox.rows")


def test_table_by_hand():
    """Prevents: rows that could not be run in a share, or exact answers left out of it."""
    row = example("print(2)")
    exact, other = evaluate.grade([row] * 2, [data.answer("", c) for c in ("print(2)", "print(3)")])
    graded = [replace(exact, run="right"), replace(other, run="right")]
    graded += [replace(other, run="wrong", reason="x")] * 2
    graded += [replace(other, run=UNKNOWN, reason="no Python 2.0")] * 3
    # 7 rows less 3 leave 4: 1 of them exact, 2 right, so that 1 is right without being exact.
    graded[2] = replace(graded[2], copied=True)
    text = execute.table({"test": graded, "train": graded[2:3]}).splitlines()
    assert text[2] == "| test | 7 | 3 | 2 (50.0 %) | 2 (50.0 %) | 1 (25.0 %) | 1 (25.0 %) |"
    assert text[3:] == ["| train | 1 | 0 | 0 (0.0 %) | 0 (0.0 %) | 0 (0.0 %) | 1 (100.0 %) |"]
    assert execute.remarks({"test": graded, "train": graded[2:3]}).splitlines() == [
        "Right, but not exact, test: row-0",
        "Right, but not exact, train: none",
        "Could not run: 3 x no Python 2.0",
    ]


def test_right_in_another_form_is_told_apart():
    """Prevents: execution that pays a form nobody asked for, or does not see what a model can."""
    row = example("print(2)")
    texts = ["```\nprint(3)\n```", "```\nprint(2)\n```", data.answer("", "print(3)")]
    graded = [replace(g, run="right") for g in evaluate.grade([row] * 3, texts)]
    # Of three that are right, one is as asked; one of the others is exact in its own form.
    line = execute.table({"test": graded}).splitlines()[2]
    assert line == "| test | 3 | 0 | 1 (33.3 %) | 3 (100.0 %) | 0 (0.0 %) | 0 (0.0 %) |"


def test_the_command_judges_the_answers_of_a_file(here, tmp_path, capsys):
    """Prevents: a model sampled where its answers are there, or outcomes beside wrong answers."""
    rows = [example("print(2)", name=f"row-{i}") for i in range(5)]
    answers = ["print( 2)", "print(3)", "print(2)  # exact", "print(2"]
    texts = [data.answer("", code) for code in answers]
    graded = evaluate.grade(rows, [*texts, "So:\n```\nprint( 2)\n```"])
    file, kept, out = (tmp_path / name for name in ("rows.jsonl", "after.jsonl", "out.jsonl"))
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    kept.write_text(evaluate.lines({"test": graded[::-1]}))
    flags = ["updates", "--data", str(file), "--answers", str(kept), "--out", str(out), "--run"]
    assert evaluate.main(flags) == 0
    said = capsys.readouterr().out
    assert "| test | 5 | 0 | 2 (40.0 %) | 3 (60.0 %) | 1 (20.0 %) | 0 (0.0 %) |" in said
    assert "| kind | rows | could not run |" in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(x["id"], x["run"]) for x in lines] == [
        ("row-4", "right"), ("row-3", "wrong"), ("row-2", "right"), ("row-1", "wrong"),
        ("row-0", "right"),
    ]  # fmt: skip
    assert lines[3]["reason"] == "it prints otherwise" and lines[2]["reason"] == ""
    assert evaluate.read(out, {"test": rows[::-1]}) == {"test": graded[::-1]}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: not a JSON object"),
        ('{"split": "test", "id": "row-0"}', "line 2: no answer with split, id and text"),
        ('{"split": "test", "id": "row-9", "text": ""}', "line 2: the data has no such row"),
        ('{"split": "test", "id": [], "text": ""}', "line 2: the data has no such row"),
    ],
)
def test_a_bad_line_of_answers_has_a_number(tmp_path, line, why):
    """Prevents: a traceback, or a share over the rows that happened to be readable."""
    row, kept = example("print(2)"), tmp_path / "after.jsonl"
    kept.write_text(evaluate.lines({"test": evaluate.copied([row])}) + line + "\n")
    with pytest.raises(ValueError, match=why):
        evaluate.answered(str(kept), {"test": [row]})
    kept.write_text("")
    with pytest.raises(ValueError, match="no answer to a row of test"):
        evaluate.answered(str(kept), {"test": [row]})
