"""The made-up updates that the bundled policy learns from, and the policy itself."""

import ast
import itertools
import random

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
    ("old", "new", "words"),
    [
        ("x = np.product(a)", "x = np.prod(a)", "`product` becomes `prod`."),
        ("f(a, axis=0)", "f(a, dim=0)", "`axis` becomes `dim`."),
        ("f(a)", "f(a, k=1)", "Add `, k=1`."),
        ("f(a, k=1)", "f(a)", "Drop `, k=1`."),
        ("y = d.add(r)", "y = p.cat([d, r])", "`d.add(r` becomes `p.cat([d, r]`."),
    ],
)
def test_thoughts_name_the_change(old, new, words):
    """Prevents: a thought that points at code which stays."""
    assert thought(old, new) == words


def test_lazy_answers_copy():
    """Prevents: a lazy phase that teaches some other failure. The prompt must not change."""
    sample = Sample("lib", "1.0", "note", "old()", "new()", "`old` becomes `new`.")
    rng = random.Random(0)
    found = [lazy(sample, rng, 0.75) for _ in range(400)]
    copies = [s for s in found if s.new == "old()"]
    assert 260 < len(copies) < 340  # 300 expected, standard deviation 8.7
    assert {s.thought for s in copies} == {LAZY, sample.thought}
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


def test_drills_swap_what_the_thought_says():
    """Prevents: drills that teach a wrong answer. Slow twin: str.replace, one sign a token."""
    tokenizer = recode.load_policy("", "cpu").tokenizer
    ids, mask = next(drills(tokenizer, seed=3))
    signs = {}
    for row, chosen in zip(ids.tolist(), mask.tolist(), strict=True):
        text = "".join(signs.setdefault(i, chr(1000 + i)) for i in row)
        mark = {s: "".join(signs.get(i, "") for i in tokenizer.encode(s)) for s in ("` becomes `",)}
        shown, _, rest = text.partition(mark["` becomes `"])
        first = chosen.index(True)
        before = len(tokenizer.encode("</doc>\n```python\n"))
        between = len(tokenizer.encode("\n```\n<think>\n`"))
        after = len(tokenizer.encode("`.\n</think>\n<answer>\n```python\n"))
        end = len(tokenizer.encode("\n```\n</answer><|im_end|>"))
        new = rest[: first - len(shown) - len(mark["` becomes `"]) - after]
        answer = text[first : len(chosen) - chosen[::-1].index(True)][:-end]
        found = [
            shown[before:cut].replace(shown[cut + between :], new) == answer
            for cut in range(before + 1, len(shown) - between)
        ]
        assert any(found)


def test_bundled_policy_is_small_and_lazy():
    """Prevents: a policy that has nothing to learn, or that has lost the form of an answer."""
    assert sum(p.stat().st_size for p in data.POLICY.iterdir()) < 10e6
    policy = recode.load_policy("", "cpu")
    config = recode.Config(device="cpu", max_new_tokens=320)
    torch.manual_seed(0)
    rows = random.Random(0).sample(data.load(split="test"), 24)
    grade = recode.grade(recode.greedy(policy, rows, config), rows, "cpu")
    assert grade["exact"] <= 25 and grade["format"] >= 75
