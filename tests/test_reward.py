"""Tests of reward.py, strip.py, edit_distance.py: hand-computed values, slow twins, hostile input.

Each docstring names the fault that the test prevents. FAULTS are those of the original release.
"""

import ast
import copy
import random
import sys
import tokenize
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import edit_distance
import reward
import strip

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
FENCE = "```"


def fenced(code: str, opening: str = "```python", think: str = "Rename it.") -> str:
    return f"{think}\n</think>\n<answer>\n{opening}\n{code}\n```\n</answer>"


def es(completion: str, target: str) -> float:
    return reward.es_star([completion], [target]).item()


def em(completion: str, target: str) -> float:
    return reward.em_star([completion], [target]).item()


# ---- the fault table of the original release ---------------------------------------------------

TWELVE = "\n".join(f's{i} = "literal {i}"' for i in range(12))
DOC = 'def f():\n    """What f does."""\n    return 1'
GAP = 'text = """a\n\n\nb"""'
TICKS = 'fence = "```"\nprint(fence)'
WIDE = "x = f(1)  # it's\ny = g(2)\nz = 3  # that's all"

FAULTS = {
    "eleven string literals": (fenced(TWELVE), TWELVE, 2.0, 2.0),
    "apostrophes in two comments": (fenced(WIDE), "x = f(1)\ny = g(2)\nz = 3", 2.0, 2.0),
    # "x = 1" (5 characters) is what the original kept; "\ny = 2\nz = 3" (12) are missing of 17,
    # so ES = 1 - 12/17 = 5/17 and ES* = 3.5 * 5/17 - 1.5.
    "code between apostrophes": (
        *(fenced("x = 1  # it's\n# that's all"), "x = 1\ny = 2\nz = 3"),
        *(3.5 * 5 / 17 - 1.5, -1.5),
    ),
    "escaped quote, then a hash": (fenced(r's = "a\" # b"'), r's = "a\" # b"', 2.0, 2.0),
    "docstring on one side": (fenced(DOC), "def f():\n    return 1", 2.0, 2.0),
    # One line end (of the 18 characters of GAP) is missing: ES = 17/18.
    "blank line in a string": (fenced('text = """a\n\nb"""'), GAP, 3.5 * 17 / 18 - 1.5, -1.5),
    "same blank lines in a string": (fenced(GAP), GAP, 2.0, 2.0),
    "comment at the end of a line": (fenced("x = 1  # note"), "x = 1", 2.0, 2.0),
    "draft in think": (fenced("x = 1", think=f"{FENCE}python\ny\n{FENCE}"), "x = 1", 2.0, 2.0),
    "code in think only": (
        *(f"{FENCE}python\nx = 1\n{FENCE}\n</think>\n<answer>as above</answer>", "x = 1"),
        *(-2.0, -2.0),
    ),
    "code in a second think": (
        f"a</think>\n<think>\n<answer>\n{FENCE}python\nx = 1\n{FENCE}\n</answer>\n</think>",
        *("x = 1", -2.0, -2.0),
    ),
    "code in an outer think": (
        f"a <think> b </think>\n<answer>\n{FENCE}\nx = 1\n{FENCE}\n</answer>\n</think>",
        *("x = 1", -2.0, -2.0),
    ),
    "two fences": (fenced(f"x = 1\n{FENCE}\n{FENCE}python\nx = 1"), "x = 1", -2.0, -2.0),
    "py": (fenced("x = 1", "```py"), "x = 1", 2.0, 2.0),
    "Python": (fenced("x = 1", "```Python"), "x = 1", 2.0, 2.0),
    "bare": (fenced("x = 1", "```"), "x = 1", 2.0, 2.0),
    "CRLF": (fenced("x = 1\ny = 2").replace("\n", "\r\n"), "x = 1\ny = 2", 2.0, 2.0),
    "fence in a string": (fenced(TICKS), TICKS, 2.0, 2.0),
    "empty code, comment target": (fenced(""), "# nothing left to do", 2.0, 2.0),
    "lone surrogate": (fenced("x = '\ud800'"), "x = 1", -2.0, -2.0),
    "NUL": (fenced("x = 1\0"), "x = 1", -2.0, -2.0),
    "unary minuses": (fenced("x = " + "-" * 100_000 + "1"), "x = 1", -2.0, -2.0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_the_release_is_mended(name):
    """A right answer scored as wrong, or a wrong one as right: a fault of the original release."""
    completion, target, es_value, em_value = FAULTS[name]
    assert es(completion, target) == pytest.approx(es_value, abs=1e-6)
    assert em(completion, target) == em_value


def test_3000_characters_are_exact():
    """The release took 3.2 s for one such pair in pure Python: here it must be exact as well."""
    a, b = "ab" * 1500, "ba" * 1500
    # Take the first "a" away and put one at the end: 2 edits; one cannot do, lengths being equal.
    assert reward.levenshtein([a], [b]).tolist() == [2]


# ---- format --------------------------------------------------------------------------------------

ANSWER = "<answer>x</answer>"
FORMATS = {
    f"why</think>{ANSWER}": 1.0,
    f"why</think>\n \t\r\n{ANSWER}\n\n": 1.0,
    "</think><answer></answer>": 1.0,
    "": -1.0,
    "why": -1.0,
    ANSWER: -1.0,  # think never ends
    "why</think>": -1.0,
    "why</think><answer>x": -1.0,
    f"why</think>so{ANSWER}": -1.0,  # text between
    f"why</think>{ANSWER}done": -1.0,  # text after
    f"<think>why</think>{ANSWER}": -1.0,  # the prompt has opened it already
    f"why</think></think>{ANSWER}": -1.0,
    f"why</think>{ANSWER}{ANSWER}": -1.0,
    "why</think><answer><answer>x</answer></answer>": -1.0,
    f"{ANSWER}why</think>": -1.0,  # answer inside think
    "</answer>why</think><answer>": -1.0,
    "<answer>why</think></answer>": -1.0,
    "why</think><answer>print('</answer>')</answer>": -1.0,  # a quoted tag is a tag
    "why</think><answer>print('<think>')</answer>": -1.0,
    "why</Think><Answer>x</Answer>": -1.0,
}


@pytest.mark.parametrize("completion", FORMATS)
def test_format(completion):
    """A loose pattern pays for text outside, missing, repeated or nested blocks."""
    assert reward.format_reward(completion) == FORMATS[completion]


# ---- extraction ----------------------------------------------------------------------------------

BLOCK = f"{FENCE}python\nx = 1\n{FENCE}"
EXTRACTS = {
    f"</think><answer>\n{BLOCK}\n</answer>": "x = 1",
    f"</think><answer>{BLOCK}</answer>": "x = 1",
    f"</think>\n<answer>Here:\n{BLOCK}\nDone.</answer> bye": "x = 1",
    f"<answer>{BLOCK}</answer></think>\n<answer>{BLOCK}</answer>": "x = 1",
    f"</think><answer>\n{FENCE}PY \t\nx = 1\n{FENCE}  \n</answer>": "x = 1",
    f"</think><answer>\n{FENCE}\r\nx = 1\r\ny = 2\r\n{FENCE}\r\n</answer>": "x = 1\ny = 2",
    f"</think><answer>\n{FENCE}\n{FENCE}\n</answer>": "",
    f"</think><answer>\n{FENCE}\n s = '''\n  {FENCE}\n'''\n{FENCE}\n</answer>": (
        f" s = '''\n  {FENCE}\n'''"
    ),
    "": None,
    BLOCK: None,
    f"<answer>{BLOCK}</answer>": None,  # think never ends, so this is inside it
    f"<answer>{BLOCK}</answer></think>": None,
    f"{BLOCK}</think><answer>x = 1</answer>": None,
    f"</think>{BLOCK}<answer></answer>": None,
    f"</think><answer></answer>{BLOCK}": None,
    f"</think><answer>{BLOCK}": None,
    f"</think>{BLOCK}</answer>": None,
    f"</think></answer><answer>{BLOCK}": None,
    f"</think><answer>{BLOCK}</answer><answer>{BLOCK}</answer>": None,
    f"</think><answer><answer>{BLOCK}</answer></answer>": None,
    f"</think><answer>\n{BLOCK}\n{BLOCK}\n</answer>": None,
    f"</think><answer>\n{BLOCK}\n{FENCE}\n</answer>": None,  # the second never ends
    f"</think><answer>\n{FENCE}python\nx = 1\n</answer>": None,
    f"</think><answer>\n{FENCE}python\nx = 1 {FENCE}\n</answer>": None,
    f"</think><answer>\n{FENCE}python x = 1{FENCE}\n</answer>": None,
    f"</think><answer>\nsee {FENCE}python\nx = 1\n{FENCE}\n</answer>": None,
    f"</think><answer>\n  {FENCE}python\nx = 1\n  {FENCE}\n</answer>": None,
    f"</think><answer>\n{FENCE}js\nx = 1\n{FENCE}\n</answer>": None,
    f"</think><answer>\n{FENCE}js\nx\n{FENCE}\n{BLOCK}\n</answer>": None,
    "</think><answer>\n~~~python\nx = 1\n~~~\n</answer>": None,
    "</think><answer>\n````python\nx = 1\n````\n</answer>": None,
}


@pytest.mark.parametrize("completion", EXTRACTS)
def test_extract_code(completion):
    """The wrong block, half a block, or text that was never the answer gets the reward."""
    assert reward.extract_code(completion) == EXTRACTS[completion]


ANY = {
    # the asked form wins, whatever comes behind it
    fenced("x = f(1)") + "\nOr:\n```\ny = 2\n```": "x = f(1)",
    "Sure!\n```python\nx = 1\n```\nGood luck.": "x = 1",
    "Old:\n```py\nx = 1\n```\nnew:\n``` \ny = 2\n```\nrun:\n```bash\nls\n```": "y = 2",
    "t\n</think>\nx = f(1)\n": "x = f(1)",
    "t\n</think><answer>\nx = f(1)\n</answer>": "x = f(1)",
    "t\n</think><answer>```python\nx = 1\n```</answer> It is done.": "x = 1",
    "t</think>\n<answer>\n```python\nx = 1\n```": "x = 1",  # no end of the answer
    "```\nx = 1\n```\n</think>\n<answer></answer>": "x = 1",  # nothing after the thought
    "```\nx = 1\n```\n</think>\nI think so.": None,  # something is, and it is no code
    "```\nx = 1\n```\nnew:\n```\ny =": None,  # cut off: the first fence was not the answer
    "```bash\nls\n```": None,
    "lib.new(x)": "lib.new(x)",
    "Done": None,
    "yes, sure": None,
    "Note: important": None,
    "pass": None,
    "# nothing to do": None,
    "x = (": None,
    "": None,
    "import x\n" * 20_000: None,  # longer than is read
}


@pytest.mark.parametrize("completion", ANY, ids=lambda text: text[:20])
def test_any_code(completion):
    """Prevents: a right answer that counts 0 for its form; prose or a quoted draft as code."""
    assert reward.any_code(completion) == ANY[completion]


def test_any_code_keeps_the_asked_form_and_raises_nothing():
    """Prevents: an answer that is right as asked and not in any form; a report that dies."""
    for completion, code in EXTRACTS.items():
        assert code is None or reward.any_code(completion) == code
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward.any_code("f('\\d')") == "f('\\d')"
    for text in ("\0", "\ud800", "(" * 10_000, "f(" * 10_000, "<answer>" * 10_000, "-" * 10**6):
        assert reward.any_code(text) is None


def test_the_reward_stays_strict():
    """Prevents: training that pays an answer outside the form that it teaches."""
    loose = "Sure!\n```python\nx = 1\n```"
    assert reward.any_code(loose) == "x = 1" and strip.same("x  =  1 # so\n", "x  =  1")
    scores = reward.score([loose], ["x = 1"], "em_copy", old_codes=["y"])
    assert scores["total"].item() == -3 and scores["exact"].item() == 0


# ---- stripping -----------------------------------------------------------------------------------

STRIPS = {
    "x = 1  # c\n\n\n# d\ny = 2\t \n": "x = 1\ny = 2",
    "\ufeff# c\r\nx = 1\r\rif x:\r\n\ty = 2\r": "x = 1\nif x:\n\ty = 2",
    "s = '# no'; t = 'it\\'s # no'  # yes": "s = '# no'; t = 'it\\'s # no'",
    's = """a  \n\n # b\t\n"""  # c': 's = """a  \n\n # b\t\n"""',
    "s = 'a \\\n\\\n  # b'\n": "s = 'a \\\n\\\n  # b'",
    "s = f'{{a}} {b!r:>{w}} # no'  # yes": "s = f'{{a}} {b!r:>{w}} # no'",
    's = f"""{\nx}\n\n # no {y}  \n"""': 's = f"""{\nx}\n\n # no {y}  \n"""',
    '"""Module."""\n\nx = 1': "x = 1",
    '"""Module."""': "",
    "# nothing": "",
    "": "",
    '"d" ; x = 1': "x = 1",
    "('a'  # c\n 'b') ; x = 1": "x = 1",
    "'a' 'b' \\\n 'c'\nx = 1": "x = 1",
    '"a"\n"b"\nx = 1': "x = 1",
    'x = 1\n"not a docstring"': 'x = 1\n"not a docstring"',
    'f"d"\nx = 1': 'f"d"\nx = 1',
    'b"d"\nx = 1': 'b"d"\nx = 1',
    '"é"; y = "é"; z = "é" # é': 'y = "é"; z = "é"',
    'def f(): "d"': "def f(): pass",
    'def f(): "d"; x = 1': "def f(): x = 1",
    'def f():\n    "d"; x = 1': "def f():\n    x = 1",
    'async def f():\n    # c\n    "d"\n    # c\n    await x': "async def f():\n    await x",
    'class A:\n  "d"\n\n  @b  # @c\n  def f(s):\n    "d"': "class A:\n  @b\n  def f(s):\n    pass",
    'def f():\n\tdef g():\n\t\t"d"\n\t\tx\n\tg': "def f():\n\tdef g():\n\t\tx\n\tg",
    "x = (1,  # a\n\n     # b\n     2)": "x = (1,\n     2)",
    "x = 1 + \\\n    2": "x = 1 + \\\n    2",
    "x = 1 \\\n\ny = 2": "x = 1\ny = 2",
    "x = 1\n\x0c\ny = '\x0c'": "x = 1\ny = '\x0c'",
    "s = '\x1c \x85 \u2028'  # c": "s = '\x1c \x85 \u2028'",
    "if x:\n    y\n# c\nelse:\n    z": "if x:\n    y\nelse:\n    z",
}


@pytest.mark.parametrize("code", STRIPS)
def test_strip_comments(code):
    """Patterns eat strings with a `#`, byte columns miss by one, form feeds split rows."""
    assert reward.strip_comments(code) == STRIPS[code]


def without_docstrings(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while node.body and strip._is_bare_string(node.body[0]):
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return ast.dump(tree)


@pytest.mark.parametrize("module", [ast, copy, random, warnings, reward, strip])
def test_strip_comments_keeps_the_program(module):
    """On real files the text left over is another program, or a second pass changes it again."""
    code = Path(module.__file__).read_text(encoding="utf-8")
    stripped = reward.strip_comments(code)
    assert ast.dump(ast.parse(stripped)) == without_docstrings(code)
    assert reward.strip_comments(stripped) == stripped
    assert reward.strip_comments(code.replace("\n", "\r\n")) == stripped
    assert all(line.strip() for line in stripped.split("\n")) or '"""' in stripped


def test_same_program_with_and_without_docstring():
    """A body of nothing but a docstring differs from one with another docstring, or with `pass`."""
    bodies = ['"a"', '"""b\n\n    c"""', "pass", '"a"\n    pass', "# c\n    pass  # d"]
    assert len({reward.strip_comments(f"def f():\n    {body}\n") for body in bodies}) == 1


NOT_PYTHON = ["x = (", "x = 'a", '"""a', " x", "if x:\ny", "x = 1\\", "a b", "$", "é\0", "'\udfff'"]


def test_strip_comments_takes_a_token_s_text_for_its_length(monkeypatch):
    """In Python 3.12.0 and 3.12.1 the end column of a token over several lines counts bytes."""
    code = "x = \"\"\"a\nbä\"\"\"+y  # é\nz = f('''é\nü''', 1)\n"
    tokens = tokenize.generate_tokens

    def counting_bytes(readline):
        for token in tokens(readline):
            (row, _), (end_row, _), last = token.start, token.end, token.string.split("\n")[-1]
            yield token._replace(end=(end_row, len(last.encode()))) if end_row > row else token

    monkeypatch.setattr(tokenize, "generate_tokens", counting_bytes)
    assert reward.strip_comments(code) == "x = \"\"\"a\nbä\"\"\"+y\nz = f('''é\nü''', 1)"


@pytest.mark.parametrize("code", NOT_PYTHON)
def test_strip_comments_raises_one_error(code):
    """Callers that catch SyntaxError let ValueError, TokenError or MemoryError through."""
    with pytest.raises(SyntaxError):
        reward.strip_comments(code)


@pytest.mark.parametrize("action", ["error", "always"])
def test_parser_warnings_change_nothing(action):
    """A bad escape prints a warning, or under `-W error` turns a right answer into -2."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        assert es(fenced(r"s = '\d'  # c"), r"s = '\d'") == 2.0
    assert not caught


# ---- Levenshtein ---------------------------------------------------------------------------------


def table(a: str, b: str) -> int:
    """The slow obvious twin: one row of the distance table after the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left_up, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left_up, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left_up + (x != y))
    return row[-1]


def texts(seed: int, count: int, alphabet: str, longest: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("alphabet", "count", "longest"),
    [
        ("ab", 3000, 9),
        ("abc", 300, 40),
        ("a\0é\ud83d\ude00\U0001f600\uffff", 500, 20),
        ("xyz", 40, 200),
    ],
)
def test_levenshtein_equals_the_table(alphabet, count, longest, device):
    """A carry lost between words, a pad that counts, UTF-16 units in place of code points."""
    a, b = texts(1, count, alphabet, longest), texts(2, count, alphabet, longest)
    assert reward.levenshtein(a, b, device).tolist() == [
        table(x, y) for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("size", [62, 63, 64, 65, 127, 128, 129, 192])
def test_levenshtein_at_word_borders(size):
    """The sign bit of a word and its first bit are where bit-parallel code goes wrong."""
    rng = random.Random(size)
    a = ["".join(rng.choices("ab", k=size)) for _ in range(6)]
    b = ["".join(rng.choices("ab", k=size - 2 + k % 5)) for k in range(6)]
    assert reward.levenshtein(a, b).tolist() == [table(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
def test_levenshtein_by_hand(device):
    """A sign or an argument order that random tests against a twin might share."""
    # kitten -> sitten -> sittin -> sitting; flaw -> law -> lawn; 3 insertions; 1 replacement
    a, b = ["kitten", "flaw", "", "", "é", "same"], ["sitting", "lawn", "abc", "", "e", "same"]
    distance = reward.levenshtein(a, b, device)
    assert distance.tolist() == [3, 2, 3, 0, 1, 0]
    assert distance.dtype == torch.long and distance.device.type == device


def test_levenshtein_of_nothing():
    """An empty batch, as when no completion parses, raises or has a wrong type."""
    distance = reward.levenshtein([], [])
    assert distance.shape == (0,) and distance.dtype == torch.long


def test_levenshtein_is_a_metric():
    """Padding or batching that breaks symmetry or the triangle inequality."""
    a, b, c = (texts(seed, 300, "abc", 12) for seed in (3, 4, 5))
    ab, bc, ac = (reward.levenshtein(*pair) for pair in ((a, b), (b, c), (a, c)))
    assert torch.equal(ab, reward.levenshtein(b, a))
    assert (ac <= ab + bc).all()
    assert torch.equal(ab == 0, torch.tensor([x == y for x, y in zip(a, b, strict=True)]))


def test_levenshtein_does_not_depend_on_the_batch(monkeypatch):
    """A neighbour's length or alphabet leaks into a pair; a split batch comes back out of order."""
    a, b = texts(6, 40, "abcd", 90), texts(7, 40, "abcé", 90)
    whole = reward.levenshtein(a, b)
    assert whole.tolist() == [
        reward.levenshtein([x], [y]).item() for x, y in zip(a, b, strict=True)
    ]
    monkeypatch.setattr(edit_distance, "MAX_CELLS", 20_000)
    assert torch.equal(whole, reward.levenshtein(a, b))


def test_levenshtein_one_very_long_side():
    """A loop over the long side takes minutes, a table of both gigabytes."""
    long = "ab" * 200_000
    assert reward.levenshtein([long, "c"], ["c" * 100, long]).tolist() == [400_000, 400_000]


def test_levenshtein_wants_equal_lengths():
    """zip drops the rows that one list has too many."""
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        reward.levenshtein(["a", "b"], ["a"])


# ---- rewards -------------------------------------------------------------------------------------

ES_CASES = [
    # target, code, distance and longer length counted by hand
    ("x = 1", "x = 1", 0, 5),
    ("x = 1", "x = 2", 1, 5),  # one character replaced
    ("np.float(x)", "float(x)", 3, 11),  # "np." put in front
    ("x = 1", "", 5, 5),
    ("# c", "ab", 2, 2),  # nothing against two characters
    ("x = 1  # c", "\n# d\nx  = 1", 1, 6),  # one blank too many, inside the line
]


@pytest.mark.parametrize("device", DEVICES)
def test_es_star_by_hand(device):
    """ES over the shorter or the summed length, or a scale that is not 3.5 * ES - 1.5."""
    completions = [fenced(code) for _, code, _, _ in ES_CASES]
    values = reward.es_star(completions, [case[0] for case in ES_CASES], device)
    expected = [3.5 * (1 - distance / longer) - 1.5 for _, _, distance, longer in ES_CASES]
    assert values.tolist() == pytest.approx(expected, abs=1e-6)
    assert values.dtype == torch.float32 and values.device.type == device


def test_copying_the_old_code_scores_high():
    """The copy-the-input baseline (ES* 1.40 to 1.87) is forgotten in a report."""
    # "product" against "prod": 3 characters of 20, ES* = 3.5 * 17/20 - 1.5 = 1.475
    assert es(fenced("y = np.product(x, 1)"), "y = np.prod(x, 1)") == pytest.approx(1.475, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["es_star", "em_star"])
def test_score_adds_up(rule, device):
    """`score` drifts from the functions it stands for, or pays outside [-3, 3]."""
    completions = [fenced("x = 1"), fenced("x = 2"), fenced("x ="), "x", fenced("x = 1") + "!"]
    targets = ["x = 1"] * 5
    result = reward.score(completions, targets, rule, device)
    one = {"es_star": 3.5 * 4 / 5 - 1.5, "em_star": -1.5}[rule]  # one character of five differs
    assert result["format"].tolist() == [1, 1, 1, -1, -1]
    assert result["correctness"].tolist() == pytest.approx([2, one, -2, -2, 2], abs=1e-6)
    assert result["exact"].tolist() == [1, 0, 0, 0, 1]
    assert result["total"].tolist() == pytest.approx([3, 1 + one, -1, -3, 1], abs=1e-6)
    assert list(result) == ["format", "correctness", "exact", "total"]
    assert all(x.dtype == torch.float32 and x.device.type == device for x in result.values())


@pytest.mark.parametrize("device", DEVICES)
def test_em_copy_by_hand(device):
    """A copy is paid like any other wrong answer, or a copy that is right like a lazy one."""
    cases = {  # answer: (target, old code, EM_copy)
        fenced("x = 1"): ("x = 1", "x = 0", 2),  # right
        fenced("x = 2"): ("x = 1", "x = 0", 0),  # wrong, but an edit
        fenced("x = 0  # same"): ("x = 1", "x = 0", -2),  # the old code; comments aside
        fenced("x = 7"): ("x = 7", "x = 7", 2),  # nothing was to be done
        fenced("x ="): ("x = 1", "x = 0", -2),
        "x = 0": ("x = 1", "x = 0", -2),  # no code, so no copy either
    }
    targets, olds, expected = (list(column) for column in zip(*cases.values(), strict=True))
    result = reward.score(list(cases), targets, "em_copy", device, olds)
    assert result["correctness"].tolist() == expected
    assert result["copied"].tolist() == [0, 0, 1, 1, 0, 0]
    assert result["total"].tolist() == [3, 1, -1, 3, -1, -3]  # format +1, but -1 for "x = 0"
    other = reward.score(list(cases), targets, "em_star", device, olds)
    assert other["correctness"].tolist() == [2, -1.5, -1.5, 2, -2, -2]  # olds change no other rule


def test_em_copy_wants_the_old_code():
    """Without it no answer is a copy, and the reward is silently another one."""
    with pytest.raises(ValueError, match="give old_codes"):
        reward.score([fenced("x = 1")], ["x = 1"], "em_copy")


def test_score_equals_the_parts_in_any_batch():
    """A cache that mixes rows up: the same completion stands against two targets."""
    completions = [fenced("a = 1"), fenced("b = 1"), fenced("a = 1"), "junk", fenced("a = 1")] * 2
    targets = ["a = 1", "a = 1", "b = 22", "b = 22", "a = 1"] * 2
    result = reward.score(completions, targets)
    rows = zip(completions, targets, strict=True)
    assert result["correctness"].tolist() == [es(c, t) for c, t in rows]
    assert result["exact"].tolist() == [
        float(em(c, t) == 2) for c, t in zip(completions, targets, strict=True)
    ]


def test_score_of_nothing():
    """An empty batch raises."""
    assert all(value.shape == (0,) for value in reward.score([], []).values())


def test_each_text_is_parsed_once(monkeypatch):
    """G samples of one prompt parse its target G times, and every reward parses again."""
    strip.strip_comments.cache_clear()
    seen, parse = [], strip._parse
    monkeypatch.setattr(strip, "_parse", lambda source: seen.append(source) or parse(source))
    for _ in range(2):
        reward.score([fenced("x = 1"), fenced("x = 2"), fenced("x = 1")], ["x = 3"] * 3)
    assert sorted(seen) == ["x = 1\n", "x = 2\n", "x = 3\n"]


@pytest.mark.parametrize("rule", [reward.es_star, reward.em_star, reward.score])
def test_errors_of_the_data_are_named(rule):
    """A broken target gives every sample -2 and looks like a model that does not learn."""
    with pytest.raises(ValueError, match=r"target .*'y = \('"):
        rule([fenced("x = 1")] * 2, ["x = 1", "y = ("])
    with pytest.raises(ValueError, match="2 completions for 1 targets"):
        rule([fenced("x = 1")] * 2, ["x = 1"])


def test_errors_of_old_code_are_named():
    """Old code that does not parse equals nothing, so that copies of it count as edits."""
    with pytest.raises(ValueError, match=r"old code .*'y = \('"):
        reward.score([fenced("x = 1")], ["x = 1"], "em_copy", old_codes=["y = ("])
    with pytest.raises(ValueError, match="shorter"):
        reward.score([fenced("x = 1")] * 2, ["x = 1"] * 2, "em_copy", old_codes=["x = 0"])


def test_unknown_correctness_is_an_error():
    """A typing error in the config falls back to another reward."""
    with pytest.raises(ValueError, match="em_star"):
        reward.score([], [], "exact")


def test_inputs_are_unchanged():
    """A reward that sorts or strips its arguments in place misaligns the rollout."""
    completions, targets = [fenced("x = 2"), fenced("x = 1")], ["x = 1", "x = 2"]
    before = copy.deepcopy((completions, targets))
    reward.score(completions, targets)
    reward.levenshtein(completions, targets)
    assert (completions, targets) == before


# ---- hostile completions -------------------------------------------------------------------------

MEGABYTE = 1_000_000
HOSTILE = {
    "NUL": "x = '\0'",
    "lone surrogate": "x = '\udc80'",
    "unary minuses": "-" * 100_000 + "1",
    "open brackets": "([{" * 3_333,
    "brackets": "(" * 10_000 + ")" * 10_000,
    "chain": "1" + "+1" * 500_000,
    "calls": "f" + "()" * 200_000,
    "f-string": "x = f'" + "{x}" * 100_000 + "'",
    "digits": "x = " + "1" * MEGABYTE,
    "one row": "x=1;" * 100_000,
    "elif": "if x: y\n" + "elif x: y\n" * 10_000,
    "indent": "".join(" " * i + "if x:\n" for i in range(200)),
    "quotes": "'" * MEGABYTE,
    "open string": '"""' + "a\n" * 300_000,
    "escaped quotes": "\n".join(['"' + '\\"' * 7_000] * 71),  # minutes without a guard, before 3.12
    "cut": "def f(x):\n    return (x,",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_does_not_parse(name):
    """The parser's errors end the run; its stack overflow ends the interpreter."""
    result = reward.score([fenced(HOSTILE[name])], ["x = 1"])
    assert result["total"].tolist() == [-1.0]  # the format is right, +1, and -2
    with pytest.raises(SyntaxError):  # also where it is too long for the reward to look at
        reward.strip_comments(HOSTILE[name])


HALF = 60_000  # characters
LONG = {
    "name": ("a" * 2 * HALF, "x = 1"),
    "comment": ("#" * 2 * HALF + "\nx = 1", "x = 1"),
    "docstring": ('"""' + "a\n" * HALF + '"""\nx = 1', "x = 1"),
    "blank": (" " * HALF + "\n" * HALF, ""),
}


def test_what_no_completion_can_be_is_not_read():
    """Seconds for each megabyte that a broken sampler returns."""
    code = "x = 1  # " + "y" * reward.MAX_TEXT
    assert es(fenced(code), "x = 1") == -2.0 and em(fenced(code), "x = 1") == -2.0
    fits = "x = 1  # " + "y" * (reward.MAX_TEXT - 200)
    assert es(fenced(fits), "x = 1") == 2.0 and em(fenced(fits), "x = 1") == 2.0


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_of_code(name):
    """Time that grows with the square of the length hangs the run."""
    code, target = LONG[name]
    # Of the name, no character is in "x = 1": distance = length, ES = 0.
    assert es(fenced(code), target) == (-1.5 if name == "name" else 2.0)


@pytest.mark.parametrize(
    "piece",
    ["<answer>", "</think>", "```", "```\n", "\n", " ", "<", "\r", "```python\n`", "</answer>"],
)
def test_a_megabyte_of_markup(piece):
    """A pattern that backtracks takes hours over tags and fences that never close."""
    for start in ("", "</think><answer>"):
        completion = start + piece * (MEGABYTE // len(piece))
        assert reward.format_reward(completion) == -1.0
        assert es(completion, "x = 1") == -2.0


def test_random_bytes():
    """Whatever a model writes, a reward comes back, and inside its bounds."""
    rng = random.Random(0)
    code = [
        rng.randbytes(rng.randint(0, 60)).decode("utf-8", "surrogateescape") for _ in range(300)
    ]
    code += texts(8, 300, "ab \n\t\x0c\\'\"#(){}[]:;=@f\0é\ud800", 25)
    completions = code + [fenced(text) for text in code]
    result = reward.score(completions, ["x = 1"] * len(completions))
    assert ((result["total"] >= -3) & (result["total"] <= 3)).all()
    assert (result["correctness"][: len(code)] == -2).all()
