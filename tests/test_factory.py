"""The made-up updates that the bundled policy learns from, and the policy itself."""

import ast
import itertools
import random
import re

import pytest
import torch

import data
import evaluate
from data.policy import edits
from data.policy.edits import Code, borrow, renames
from data.policy.make import LAZY, batches, drills, encode, lazy, main, make_model
from data.policy.notes import tell, tell_gone
from data.policy.programs import Grammar, Renamer
from data.policy.synthetic import Sample, stream, thought
from policy import load


@pytest.fixture(scope="module")
def train_rows():
    return data.load(split="train")


@pytest.fixture(scope="module")
def samples(train_rows):
    return list(itertools.islice(stream(train_rows, seed=1), 150))


def test_stream_is_seeded(train_rows, samples):
    """Prevents: a policy that nobody can make again."""
    assert list(itertools.islice(stream(train_rows, seed=1), 20)) == samples[:20]
    assert list(itertools.islice(stream(train_rows, seed=2), 20)) != samples[:20]


def test_samples_are_programs_that_change(samples):
    """Prevents: training on text that is no Python, or on answers that copy."""
    for s in samples:
        assert ast.dump(ast.parse(s.old)) != ast.dump(ast.parse(s.new)), s
        assert s.note and s.thought


def test_renaming_is_consistent_and_keeps_the_language():
    """Prevents: a note that speaks of other names than the code; a renamed `print`."""
    renamer = Renamer(random.Random(0), ["alpha", "beta", "gamma"])
    renamer.stay = 0.0
    code = renamer.code("total = np.product(sizes)\nprint(total.product, np)")
    words = [w for w in code.replace("(", " ").replace(")", " ").replace(".", " ").split()]
    assert "print" in words and words[0] in words[words.index("print") :]
    note = renamer.note("The product of sizes: use `np.product`.")
    assert note.startswith("The product of sizes: use `")  # prose stays
    assert note.split("`")[1] == code.split(" = ")[1].split("(")[0]


@pytest.mark.parametrize(
    ("old", "new", "note", "words"),
    [
        # from the name in the note to the end of the line
        (
            "x = np.product(a) / n\ny = 1",
            "x = np.prod(a) / n\ny = 1",
            "`np.product` is gone.",
            "Replace `product(a) / n` by `prod(a) / n`.",
        ),
        ("f(a, axis=0)", "f(a, dim=0)", "`axis` is now `dim`.", "Replace `axis=0)` by `dim=0)`."),
        # no name of the note goes: the place is told by the one that stands before it ...
        ("f(a)", "f(a, k=1)", "`f` needs `k=1`.", "Replace `f(a)` by `f(a, k=1)`."),
        ("f(a, k=1)", "f(a)", "Drop `k` of `f`.", "Replace `f(a, k=1)` by `f(a)`."),
        # ... in whatever place the dropped argument stood, and the nearest one of several
        ("f(k=1, b=2)", "f(b=2)", "Drop `k` of `f`.", "Replace `f(k=1, b=2)` by `f(b=2)`."),
        ("g(a).f(b)", "g(a).f(b, k=1)", "`g().f` needs `k`.", "Replace `f(b)` by `f(b, k=1)`."),
        # ... or else by the word that the change begins with, or the last one before it
        ("f(a) + b", "f(c) + b", "Calls change.", "Replace `a) + b` by `c) + b`."),
        ("f(a)", "f(a, k=1)", "Calls need k.", "Replace `a)` by `a, k=1)`."),
        # changes of one line are one patch, though the two sides share "d", "." and "r"
        (
            "y = d.add(r)",
            "y = p.cat([d, r])",
            "`d.add(r)` becomes `p.cat([d, r])`.",
            "Replace `d.add(r)` by `p.cat([d, r])`.",
        ),
        # every changed line has its patch; a new line comes with its neighbour
        (
            "a.f()\nb.f()",
            "a.g()\nb.g()",
            "`f` is `g`.",
            "Replace `f()` by `g()`. Replace `f()` by `g()`.",
        ),
        ("import a\na.f", "import a\nimport b\na.f", "Add b.", "Replace `a.f` by `import b\na.f`."),
        # a patch that would begin inside the last one is one with it
        (
            "f(\n    [a]\n)\n",
            "f([[a]])\n",
            "Pass a list.",
            "Replace `f(\n    [a]\n)\n` by `f([[a]])\n`.",
        ),
    ],
)
def test_thoughts_rewrite_lines(old, new, note, words):
    """Prevents: a thought that does not tell where the change is, or what it is."""
    assert thought(old, new, note) == words


def test_thoughts_fit_both_programs(samples):
    """Prevents: a patch that the old code does not contain, or that leads to other code."""
    for s in samples:
        sides = re.findall(r"Replace `([^`]*)` by `([^`]*)`\.", s.thought)
        assert sides or "`" in s.old + s.new
        for old, new in sides:
            assert old in s.old and new in s.new, s


def test_borrowed_notes_speak_of_their_new_program(train_rows):
    """Prevents: the note of a real rename that names what the made-up pair does not change."""
    rng, borrowed = random.Random(0), renames(train_rows)
    assert {one.role for one in borrowed} == {"keyword", "attribute", "name"}
    grammar = Grammar(rng, ["alpha", "beta", "gamma", "delta"])
    code, told = Code("out = lib.run(total, depth=3)\nshow(out.shape)\n"), 0
    for _ in range(300):
        found = borrow(code, grammar, borrowed)
        if not found or found[0] == code.source:
            continue
        new, note = found
        words = [re.findall(r"\w+", text) for text in (code.source, new)]
        ((old, fresh),) = {pair for pair in zip(*words, strict=True) if pair[0] != pair[1]}
        quoted = re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", note)))
        assert old in quoted and fresh in quoted, (note, old, fresh)
        told += 1
    assert told > 200


@pytest.mark.parametrize(
    ("change", "source", "results"),  # N stands for a new name, M for a module, V for a value
    [
        (edits.rename, "np.product(a)", ["np.N(a)"]),
        (edits.move, "m.linear.norm(a)", ["m.norm(a)", "m.linear.N.N(a)", "m.N.N.norm(a)"]),
        (edits.change_module, "import old", ["import N", "import old.N"]),
        (
            edits.change_module,
            "from m.old import a, b as c",
            [
                "from m.old import a\nfrom M import b as c",
                "from M import b as c\nfrom m.old import a",
                "from m.old import b as c\nfrom M import a",
                "from M import a\nfrom m.old import b as c",
                "from m import a\nfrom m.old import b as c",  # up, not only elsewhere
            ],
        ),
        (edits.change_keyword, "run(a, axis=0)", ["run(a, N=0)", "run(a)", "run(a, axis=V)"]),
        (edits.change_keyword, "run(axis=0, *a)", ["run(N=0, *a)", "run(*a)", "run(axis=V, *a)"]),
        (edits.change_argument, "run(a, b)", ["run(N=a, N=b)", "run(a, N=b)", "run(a, b, N=V)"]),
        (edits.change_argument, "run()", ["run(N=V)"]),
        (edits.change_attribute, "show(a.size)", ["show(a.size())"]),
        (edits.change_attribute, "show(a.size())", ["show(a.size)"]),
        (
            edits.change_form,
            "run(a, b)",
            [
                *("run(a, b).N", "run(a, b).N()", "run.N(a, b)", "run(a, b)[0]", "run(a, b)[N]"),
                *("list(run(a, b))", "run([a, b])", "run((a, b))", "run(a, N=b)", "N.N(run(a, b))"),
                *("N.N(a, b)", "N(N(a), b)", "N(a, b).N()", "N(b, a)", "a.N(b)"),
            ],
        ),
    ],
)
def test_each_kind_edits_as_it_says(change, source, results):
    """Prevents: an update that does something else than its kind, or never one of its forms."""
    grammar, seen = Grammar(random.Random(0), ["alpha", "beta", "gamma", "delta"]), set()
    made = [change(Code(source + "\n"), grammar) for _ in range(600)]
    signs = {"N": r"\w+", "M": r"[\w.]+", "V": r"[\w.\"/: -]+"}
    patterns = [re.sub("[NMV]", lambda m: signs[m[0]], re.escape(text)) for text in results]
    for new, note in filter(None, made):
        fits = [pattern for pattern in patterns if re.fullmatch(pattern + "\n", new)]
        assert fits and note, new
        seen.update(fits)
    assert seen == set(patterns)


@pytest.mark.parametrize(
    ("tell_it", "told", "names", "wordings"),
    [
        (tell, ["before_it", "after_it", "function"], {"before_it", "after_it"}, 2000),
        (tell, ["before_it", "after_it", "", "pkg.load"], {"before_it", "after_it"}, 2000),
        (tell_gone, ["before_it", "pkg.load"], {"before_it", "load"}, 1000),
    ],
)
def test_made_up_notes_tell_the_names(tell_it, told, names, wordings):
    """Prevents: a note from which the answer cannot be known, or so few that they are learnt."""
    grammar = Grammar(random.Random(0), ["alpha"])
    notes = [tell_it(grammar, *told) for _ in range(3000)]
    for note in notes:
        shown = re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", note)))
        assert names <= set(shown), note
        assert note.endswith((".", "`")) and "{" not in note
    assert len(set(notes)) > wordings


def test_primed_heads_look_back():
    """Prevents: a start in which the first layer's head h does not see the token h + 1 back."""
    torch.manual_seed(0)
    model = make_model(load("", "cpu").tokenizer)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 1000, (1, 60))
    with torch.no_grad():
        seen = model(input_ids=ids, output_attentions=True).attentions[0][0]  # [H, L, L]
    for h, rows in enumerate(seen):
        back = torch.arange(60) - rows.argmax(-1)  # [L]
        assert (back[10:] == h + 1).float().mean() > 0.95


def test_a_missing_compiler_is_one_sentence(monkeypatch, capsys, tmp_path):
    """Prevents: without a C++ compiler a worker's traceback, after the tokenizer was made."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("sys.argv", ["make.py", "--out", str(tmp_path / "policy")])
    with pytest.raises(SystemExit):
        main()
    assert "needs a C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_lazy_answers_copy():
    """Prevents: a lazy phase that teaches some other failure. The prompt must not change."""
    sample = Sample("lib", "1.0", "note", "old()", "new()", "Replace `old()` by `new()`.")
    rng = random.Random(0)
    found = [lazy(sample, rng, 0.75) for _ in range(400)]
    copies = [s for s in found if s.new == "old()"]
    assert 260 < len(copies) < 340  # 300 expected, standard deviation 8.7
    assert {s.thought for s in copies} == {LAZY}
    assert {(s.library, s.note, s.old) for s in found} == {("lib", "note", "old()")}


def test_masks_cover_the_answers_alone(samples):
    """Prevents: the loss counts padding or the prompt, or forgets the end token."""
    tokenizer = load("", "cpu").tokenizer
    rows = {tuple(ids): prompt for ids, prompt in encode(samples, tokenizer)}
    ids, mask = next(batches(iter(samples * 8), tokenizer, 3000, 400))
    for row, chosen in zip(ids.tolist(), mask, strict=True):
        last = int(chosen.nonzero()[-1]) + 1
        assert row[last - 1] == tokenizer.eos_token_id
        assert int(chosen.nonzero()[0]) == rows[tuple(row[:last])] and not any(row[last:])


def test_drills_obey_their_note():
    """Prevents: drills that teach a wrong answer. Slow twin: str.replace, one sign a token."""
    tokenizer = load("", "cpu").tokenizer

    def signs(ids):
        return "".join(chr(1000 + i) for i in ids)

    def joint(text):
        return signs(tokenizer.encode(text, add_special_tokens=False))

    ids, mask = next(drills(tokenizer, seed=3))
    assert len(ids) > 10
    for row, chosen in zip(ids.tolist(), mask.tolist(), strict=True):
        prompt = signs(i for i, answer in zip(row, chosen, strict=True) if not answer)
        answer = signs(i for i, answer in zip(row, chosen, strict=True) if answer)
        note, _, rest = prompt.partition(joint("`\n</doc>\n```python\n"))
        old, _, new = note.removeprefix(joint("<doc>\n`")).partition(joint("` by `"))
        program = rest.partition(joint("\n```\n"))[0]
        patches, _, code = answer.partition(joint("\n</think>\n<answer>\n```python\n"))
        assert code.partition(joint("\n```\n</answer>"))[0] == program.replace(old, new)
        _, *patches = patches.split(joint("Replace `"))
        assert len(patches) == program.count(old)
        lines = program.split(joint("\n"))
        for patch, line in zip(patches, (x for x in lines if old in x), strict=True):
            before = line[line.index(old) :]
            after = before.replace(old, new)
            assert patch == before + joint("` by `") + after + joint("`.")


def test_bundled_policy_is_small_and_lazy():
    """Prevents: a policy that has nothing to learn, or that has lost the form of an answer."""
    assert sum(p.stat().st_size for p in data.POLICY.iterdir()) < 10e6
    torch.manual_seed(0)
    rows = random.Random(0).sample(data.load(split="test"), 24)
    means = evaluate.means(evaluate.greedy(load("", "cpu"), rows, 320))
    assert means["exact"] <= 25 and means["format"] >= 75
