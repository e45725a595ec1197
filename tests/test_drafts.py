"""drafts.py against the undrafted rollout: token for token, whatever the drafts are worth.

The models are those of test_families.py, with a head so sharp that even at temperature 1 they
repeat themselves, as migrations repeat their prompt.
"""

import random
from functools import partial

import pytest
import torch
from test_families import BUILD, build
from test_rollout import draw

import data
import drafts
import rollout as R
from policy import load
from upkeep import metrics

PROMPTS = [[5, 9, 2, 5, 9, 2], [7, 1, 1, 8, 1, 1, 8, 1], [11], [6, 31, 2, 6, 31]]


def sharp(name="qwen2", by=3.0):
    model = build(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(by * head.weight.detach())
    return model


def both(model, prompts=PROMPTS, **how):
    """The rollout without drafts and with them, which must have had some."""
    plain, drafted = (draw(model, prompts, finish=f, **how) for f in (None, drafts.finish))
    assert torch.equal(plain.forwards, plain.length)
    return plain, drafted


def same(plain, drafted):
    """All but the forwards, which are no more than the tokens."""
    for name in ("tokens", "mask", "length", "truncated"):
        assert torch.equal(getattr(plain, name), getattr(drafted, name))
    torch.testing.assert_close(plain.logp, drafted.logp, rtol=1e-5, atol=1e-5)
    assert (drafted.forwards <= drafted.length).all() and (drafted.forwards > 0).all()


@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("temperature", [0, 0.7, 1])
@pytest.mark.parametrize("name", BUILD)
def test_tokens_and_logp_are_those_without_drafts(monkeypatch, name, temperature, G):
    """Prevents: a cache, mask, window or position that is another one where a row has a length of
    its own; a draw with another position's number."""
    T = 12 if name == "phi3 longrope" else 40  # its angles change beyond 20 tokens
    how = dict(group_size=G, few=4 * G, max_new_tokens=T, temperature=temperature, eos_ids=[3, 17])
    model, luck = sharp(name, by=2.0), random.Random(0)
    plain, drafted = both(model, **how)
    same(plain, drafted)

    def look_up(row, most):  # the truth, with every fifth token wrong: all that may happen
        true = plain.tokens.flatten(0, 1)[row.number, row.length :].tolist()[:most]
        row.guess = row.draft = [luck.randrange(40) if luck.random() < 0.2 else x for x in true]

    monkeypatch.setattr(drafts.Row, "look_up", look_up)
    plain, drafted = both(model, **how)
    same(plain, drafted)
    assert (drafted.length - drafted.forwards).sum() > (drafted.length - 1).sum() / 4


@pytest.mark.parametrize("few", [2, 5, 12])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_rollout_goes_on_with_drafts_wherever_few_rows_are_left(few, top_p):
    """Prevents: rows mixed up when some have ended, or that lose what the cache held of them."""
    model = sharp(by=2.0)
    how = dict(group_size=3, max_new_tokens=40, eos_ids=[3, 17, 21, 8, 30], top_p=top_p)
    plain, drafted = both(model, seed=4, few=few, **how)
    same(plain, drafted)
    assert (plain.length > 1).sum() > 5  # so that two or five are left later
    assert drafted.forwards.sum() < drafted.length.sum()


def test_fresh_memory_does_not_show_through():
    """Prevents: NaN from where another row has tokens and this one none: 0 times NaN is NaN."""
    how = dict(few=5, max_new_tokens=30, eos_ids=[3, 17, 21, 8, 30], seed=4)
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        plain, drafted = both(sharp(by=2.0), **how)
    finally:
        torch.use_deterministic_algorithms(False)
    same(plain, drafted)
    assert drafted.forwards.sum() < drafted.length.sum()


def test_ends_and_the_longest_length_inside_a_draft():
    """Prevents: a row goes on behind its end token, or beyond max_new_tokens, because the draft
    did; or an end id but the first does not end it."""
    model, how = sharp(), dict(temperature=0, group_size=1)
    free = draw(model, PROMPTS, eos_ids=[], max_new_tokens=30, **how).tokens
    for token in free.unique().tolist()[:8]:
        same(*both(model, eos_ids=[39, token], max_new_tokens=30, **how))
    for T in (1, 2, 3, 5, 8, 13):
        same(*both(model, eos_ids=[], max_new_tokens=T, **how))


def test_rows_that_have_ended_leave_the_cache(monkeypatch):
    """Prevents: each forward attends for rows that ended long ago, which took most of the time."""
    seen, check = [], drafts.check

    def counted(model, layout, tail, pick, rows):
        keys, values = layout.cache.own[0]  # [B, K, G, room, D]
        assert keys.shape[:3:2] == values.shape[:3:2] == tail.row.shape == tail.running.shape
        seen.append((tail.row.numel(), len(rows)))
        return check(model, layout, tail, pick, rows)

    monkeypatch.setattr(drafts, "check", counted)
    how = dict(group_size=1, max_new_tokens=40, eos_ids=[3, 17], seed=4)
    same(*both(sharp(by=2.0), **how))
    assert {places for places, _ in seen} == {rows for _, rows in seen} == {4, 3, 2, 1}
    assert all(places == rows for places, rows in seen)


def test_a_small_model_drafts_for_many_rows():
    """Prevents: 64 rows of the bundled policy wait for 56 to end before one forward gives two."""
    small, large = sharp(), torch.nn.Linear(1, 1)
    large.weight = torch.nn.Parameter(torch.empty(6 * 10**7, 1, device="meta"))
    small, large = map(drafts.pace, (small, large))
    assert (small["few"], small["finish"].keywords["tokens"]) == (64, 384)
    assert (large["few"], large["finish"].keywords["tokens"]) == (8, 32)


def test_numbers_behind_the_end_are_not_looked_at():
    """Prevents: what is drawn behind a row's end, as its draft goes on, changes the row."""
    model = sharp(by=2.0)
    uniform = R.numbers(40, 4, 1, torch.Generator().manual_seed(0))
    how = dict(group_size=1, max_new_tokens=40, eos_ids=[3, 17, 21, 8, 30], finish=drafts.finish)
    first = draw(model, PROMPTS, uniform=uniform, **how)
    behind = torch.arange(40)[:, None, None] >= first.length
    assert behind.any()
    same(draw(model, PROMPTS, uniform=uniform.where(~behind, 0.999), **how), first)


def test_the_generator_ends_where_it_does_without_drafts():
    """Prevents: the next rollout of a run is another one because this one was drafted."""
    states = []
    for finish in (None, drafts.finish):
        generator = torch.Generator().manual_seed(0)
        how = dict(group_size=1, max_new_tokens=9, eos_ids=[3], pad_id=0, finish=finish)
        R.sample(sharp(), PROMPTS, generator=generator, **how)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_bfloat16_keeps_the_distribution():
    """Prevents: tokens that were drafted come more often than the policy says them."""
    model, n = sharp(by=1.0).to(torch.bfloat16), 2000
    how = dict(group_size=n, few=n, max_new_tokens=4, eos_ids=[])
    finish = partial(drafts.finish, tokens=10**6)
    plain, drafted = (
        draw(model, PROMPTS[:1], seed, finish=f, **how) for seed, f in enumerate((None, finish))
    )
    assert drafted.forwards.sum() < drafted.length.sum() - n / 10
    for t in range(4):
        a, b = (x.tokens[0, :, t].bincount(minlength=40) / n for x in (plain, drafted))
        p = (a + b) / 2
        assert ((a - b).abs() <= 4 * (2 * p * (1 - p) / n).sqrt() + 1e-9).all()


# ----------------------------------------------------------------------------- one row, by hand


def row(text, begin, **more):
    seen = {}
    drafts.note(seen, text, 0)
    return drafts.Row(0, (0, 0), list(text), begin, seen, **more)


def test_a_draft_is_what_followed_the_longest_match_last():
    """Prevents: a draft from the row's own end, where nothing follows, or one that is too long."""
    one = row([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], begin=8)
    one.look_up(9)  # 1 2 3 was followed by 4; 2 3 alone, later, by 5
    assert one.draft == [4, 9, 2, 3, 5, 1, 2, 3][:8] and one.length == 3
    one.look_up(2)
    assert one.draft == [4, 9]
    other = row([2, 3, 5, 7, 2, 3, 6, 8, 2, 3], begin=2)
    other.look_up(9)
    assert other.draft == [6, 8, 2, 3]
    none = row([1, 2, 3, 4], begin=2)
    none.look_up(9)
    assert none.draft == []


def test_a_row_keeps_what_agrees_one_more_and_nothing_behind_an_end():
    """Prevents: the first token that differs is lost, or one behind it is kept."""
    for drawn, ends, kept in (
        ([4, 9, 7, 6, 5], {0}, [4, 9, 7]),
        ([4, 9, 2, 6, 5], {0}, [4, 9, 2, 6]),
        ([8, 9, 2, 6, 5], {0}, [8]),
        ([4, 9, 2, 6, 5], {9, 2}, [4, 9]),
        ([4, 9, 7, 6, 5], {7}, [4, 9, 7]),
    ):
        one = row([1, 2, 3, 4, 9, 2, 5, 1, 2, 3], begin=7)
        one.look_up(3)
        assert one.draft == [4, 9, 2]
        one.take(drawn, ends)
        assert one.text[10:] == kept


def test_drafts_grow_while_they_are_right_and_stop_while_they_are_wrong():
    """Prevents: drafts that never pay are paid for until the end, or stay off for ever."""
    sizes, one = [], row([1, 2] * 40, begin=20, size=4)
    for right in (True, True, True, False, False, False, False, False, True, True):
        one.text, one.guess = one.text[:60], [1, 2] * 8
        one.draft = one.guess[: one.size]
        one.take(one.guess[: len(one.draft) + 1] if right else [5], {0})
        sizes.append(one.size)
    assert sizes == [8, 16, 16, 8, 4, 2, 1, 0, 1, 2]


# ------------------------------------------------------------------------------------ in its place


def test_a_policy_drafts_unless_it_is_to_be_plain():
    """Prevents: the toy's training is drafted, whose digits are published; or nothing is."""
    policy = load("", "cpu")
    prompts = policy.prompts(data.load(split="test")[:2])
    how = dict(group_size=1, max_new_tokens=80, temperature=0.0)
    plain, drafted = (policy.sample(prompts, plain=plain, **how) for plain in (True, False))
    assert torch.equal(plain.tokens, drafted.tokens)
    assert torch.equal(plain.forwards, plain.length)
    assert drafted.forwards.sum() < drafted.length.sum() / 2


def test_tokens_a_forward_stand_in_the_metrics_where_there_were_drafts():
    """Prevents: new keys in the records of runs without drafts; a mean over rows that weighs a
    short one as a long one."""
    scores = dict.fromkeys(("total", "exact", "copied", "format", "dead"), torch.ones(1, 2))
    for forwards, want in ((torch.tensor([[3, 1]]), 2.0), (torch.tensor([[6, 2]]), None)):
        rollout = R.written([[1]], [[[5] * 6, [5] * 2]], pad_id=0, device="cpu")
        rollout.forwards = forwards
        log = metrics.Log()
        log.sampled(rollout, scores)
        assert log.close().get("tokens_per_forward") == want
    joined = R.join([rollout.pick([0])])
    assert torch.equal(joined.forwards, rollout.forwards)  # as ranks gather them
