"""The made-up updates that the bundled policy learns from, and the policy itself."""

import ast
import itertools
import random
import re

import pytest
import torch

import data
import recode
from data.make_policy import LAZY, batches, drills, encode, lazy
from data.synthetic import Renamer, Sample, stream, thought


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
        # the name from the note, then the change and two pieces of the code behind it
        (
            "x = np.product(a)",
            "x = np.prod(a)",
            "`np.product` is gone.",
            "Find `product`. Replace `product(a` by `prod(a`.",
        ),
        (
            "f(a, axis=0)",
            "f(a, dim=0)",
            "`axis` is now `dim`.",
            "Find `axis`. Replace `axis=0` by `dim=0`.",
        ),
        # nothing goes, so the place is told by the name that stands before it
        ("f(a)", "f(a, k=1)", "`f` needs `k=1`.", "Find `f`. Replace `f(a)` by `f(a, k=1)`."),
        ("f(a)", "f(a, k=1)", "Calls need k.", "Replace `)` by `, k=1)`."),
        ("f(a, k=1)", "f(a)", "Drop `k`.", "Find `k`. Replace `, k=1)` by `)`."),
        # one change, though the two sides share "d", "." and "r"; of three rare names the longest
        (
            "y = d.add(r)",
            "y = p.cat([d, r])",
            "`d.add(r)` becomes `p.cat([d, r])`.",
            "Find `add`. Replace `d.add(r)` by `p.cat([d, r])`.",
        ),
        (
            "a.f()\nb.f()",
            "a.g()\nb.g()",
            "`f` is `g`.",
            "Find `f`. Replace `f()\n` by `g()\n`. Replace `f()` by `g()`.",
        ),
    ],
)
def test_thoughts_are_patches(old, new, note, words):
    """Prevents: a thought that does not tell where the change is, or what it is."""
    assert thought(old, new, note) == words


def test_thoughts_fit_both_programs(samples):
    """Prevents: a patch that the old code does not contain, or that leads to other code."""
    for s in samples:
        sides = re.findall(r"Replace `([^`]*)` by `([^`]*)`\.", s.thought)
        assert sides or "`" in s.old + s.new
        for old, new in sides:
            assert old in s.old and new in s.new, s
        assert all(name in s.note for name in re.findall(r"Find `([^`]*)`", s.thought))


def test_lazy_answers_copy():
    """Prevents: a lazy phase that teaches some other failure. The prompt must not change."""
    sample = Sample("lib", "1.0", "note", "old()", "new()", "Replace `old` by `new`.")
    rng = random.Random(0)
    found = [lazy(sample, rng, 0.75) for _ in range(400)]
    copies = [s for s in found if s.new == "old()"]
    assert 260 < len(copies) < 340  # 300 expected, standard deviation 8.7
    assert {s.thought for s in copies} == {LAZY}
    assert {(s.library, s.note, s.old) for s in found} == {("lib", "note", "old()")}


def test_masks_cover_the_answers_alone(samples):
    """Prevents: the loss counts padding or the prompt, or forgets the end token."""
    tokenizer = recode.load_policy("", "cpu").tokenizer
    rows = {tuple(ids): prompt for ids, prompt in encode(samples, tokenizer)}
    ids, mask = next(batches(iter(samples * 8), tokenizer, 3000, 400))
    for row, chosen in zip(ids.tolist(), mask, strict=True):
        last = int(chosen.nonzero()[-1]) + 1
        assert row[last - 1] == tokenizer.eos_token_id
        assert int(chosen.nonzero()[0]) == rows[tuple(row[:last])] and not any(row[last:])


def test_drills_obey_their_note():
    """Prevents: drills that teach a wrong answer. Slow twin: str.replace, one sign a token."""
    tokenizer = recode.load_policy("", "cpu").tokenizer

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
        patches, _, code = answer.partition(joint("`.\n</think>\n<answer>\n```python\n"))
        assert code.partition(joint("\n```\n</answer>"))[0] == program.replace(old, new)
        found, *patches = patches.split(joint("`. Replace `"))
        assert found == old and len(patches) == program.count(old)
        for patch in patches:
            before, _, after = patch.partition(joint("` by `"))
            assert before in program and before.replace(old, new) == after


def test_bundled_policy_is_small_and_lazy():
    """Prevents: a policy that has nothing to learn, or that has lost the form of an answer."""
    assert sum(p.stat().st_size for p in data.POLICY.iterdir()) < 10e6
    policy = recode.load_policy("", "cpu")
    config = recode.Config(device="cpu", max_new_tokens=320)
    torch.manual_seed(0)
    rows = random.Random(0).sample(data.load(split="test"), 24)
    grade = recode.grade(recode.greedy(policy, rows, config), rows, "cpu")
    assert grade["exact"] <= 25 and grade["format"] >= 75
