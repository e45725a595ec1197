"""Dr. GRPO, GSPO, CISPO by hand, by TRL and verl, and where one is another. Docstrings name the
faults prevented."""

import inspect
import math

import oracle_variants as oracle
import pytest
import torch

import config
import dapo
import grpo
import variants

NAMES = ("drgrpo", "gspo", "cispo")
LIMIT = 5  # Dr. GRPO's L
OF = variants.of(LIMIT)
# clips that cut some of what `random_step` makes, and not all
CLIPS = {"drgrpo": {"clip": 0.3}, "gspo": {"clip_low": 0.1, "clip_high": 0.2}}
CLIPS["cispo"] = {"clip_high": 0.3}


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def run(loss, logp, old_logp, adv, weight, **options):
    """Value, gradient in logp, and log of one call."""
    logp = logp.detach().clone().requires_grad_()
    value, info = loss(logp, old_logp, adv, weight, **options)
    (grad,) = torch.autograd.grad(value, logp)
    return value.item(), grad, info


def two(name, adv, ratios, logp=(-1.0, -2.0), **options):
    """One answer of two tokens, N = 1: value, both gradients, log."""
    logp, algo = row(*logp), OF[name]
    weight = algo.token_weight(torch.ones(1, 2).bool()).double()
    old_logp = logp - row(*ratios).log()
    value, grad, info = run(algo.loss, logp, old_logp, row(adv), weight, **options)
    return value, grad[0].tolist(), info


def random_step(seed, N=6, T=LIMIT):
    """Unequal lengths (row 0 is empty), one advantage a row, ratios on both sides of the clips."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=g)  # [N, T]
    mask[0] = False
    logp, noise = torch.randn(2, N, T, generator=g, dtype=torch.float64)
    adv = torch.randn(N, 1, generator=g, dtype=torch.float64)
    return mask, logp - 3, logp - 3 + 0.4 * noise, adv


# ---- by hand, two tokens -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adv", "value", "grads"),
    [
        # weights 1 / (1 * 5); ratios 1.5 and 0.9, clipped to 1.2 and 0.9
        (2.0, -0.84, [0.0, -0.36]),  # (min(3, 2.4) + min(1.8, 1.8)) / 5; second token -0.9 * 2 / 5
        (-2.0, 0.96, [0.6, 0.36]),  # (min(-3, -2.4) + -1.8) / 5; 1.5 * 2 / 5 and 0.9 * 2 / 5
    ],
)
def test_drgrpo_by_hand(adv, value, grads):
    """A division by the answer's length, or by the padded width of 2, in place of L = 5."""
    got = two("drgrpo", adv, (1.5, 0.9), clip=0.2)
    assert got[0] == pytest.approx(value) and got[1] == pytest.approx(grads)


def test_drgrpo_has_no_std():
    """A spread that is divided by, or that a setting could bring back."""
    adv = OF["drgrpo"].advantage(row(1, 2, 6), scale=True)  # mean 3
    assert adv.tolist() == [[-2, -1, 3]]


def test_drgrpo_weighs_each_token_alike():
    """A weight that depends on lengths; one that counts no empty row; 0 / 0 without a token."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    torch.testing.assert_close(OF["drgrpo"].token_weight(mask), mask / 15)  # N L = 3 * 5
    assert (OF["drgrpo"].token_weight(mask[2:]) == 0).all()


@pytest.mark.parametrize(
    ("adv", "ratios", "value", "grads", "cut"),
    [
        # s = sqrt(1.21 * 1) = 1.1; uncut: value -s A, each token half of -s A
        (2.0, (1.21, 1.0), -2.0008, [0.0, 0.0], 1),  # min(2.2, 1.0004 * 2)
        (-2.0, (1.21, 1.0), 2.2, [1.1, 1.1], 0),  # min(-2.2, 1.0004 * -2)
        # s = sqrt(0.81 * 1) = 0.9
        (2.0, (0.81, 1.0), -1.8, [-0.9, -0.9], 0),  # min(1.8, 0.9997 * 2)
        (-2.0, (0.81, 1.0), 1.9994, [0.0, 0.0], 1),  # min(-1.8, 0.9997 * -2)
        # s = sqrt(2 * 0.5) = 1, where GRPO would have stopped the first token
        (2.0, (2.0, 0.5), -2.0, [-1.0, -1.0], 0),
    ],
)
def test_gspo_by_hand(adv, ratios, value, grads, cut):
    """Token ratios, an arithmetic mean of them (1.105; 1.25), the product of them (1.21), clips
    that are not the paper's 3e-4 and 4e-4 or the other way round, a gradient not over |o_i|."""
    got = two("gspo", adv, ratios)
    assert got[0] == pytest.approx(value, abs=1e-9) and got[1] == pytest.approx(grads, abs=1e-9)
    assert got[2]["clipfrac"] == cut
    assert got[2]["ratio"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))


@pytest.mark.parametrize(
    ("adv", "bound", "value", "grads"),
    [
        # weights 1/2; ratios 6 and 0.5, logp -1 and -2; value -(r' A logp) / 2, gradient -r' A / 2
        (2.0, {}, 6.0, [-5.0, -0.5]),  # r' = 5, 0.5: -(5 * 2 * -1 + 0.5 * 2 * -2) / 2
        (-2.0, {}, -6.0, [5.0, 0.5]),  # bounded for a bad token too
        (2.0, {"clip_high": 0.2}, 2.2, [-1.2, -0.5]),  # r' = 1.2, 0.5: (2.4 + 2) / 2
    ],
)
def test_cispo_by_hand(adv, bound, value, grads):
    """A gradient that the clip drops, or that flows through the ratio; a lower bound; a bound at
    eps in place of 1 + eps; a bound for good tokens only."""
    got = two("cispo", adv, (6.0, 0.5), **bound)
    assert got[0] == pytest.approx(value) and got[1] == pytest.approx(grads)
    assert got[2] == pytest.approx({"clipfrac": 0.5, "ratio": 3.25})  # (6 + 0.5) / 2


# ---- by other people's code ----------------------------------------------------------------------

# What `python tests/oracle_variants.py` printed under Python 3.11, torch 2.13.0, TRL 1.16.0 and
# verl 0.9.1, in float64: loss, and gradient in logp. TRL and verl agree to 2e-9 (GSPO: verl adds
# 1e-8 to a length) and else in every digit; these are TRL's.
ORACLE = {
    "drgrpo": (
        -0.022778723,
        [
            [0.0, -0.055258546, -0.027440582],
            [-0.029632729, 0.0, 0.0],
            [0.027145123, 0.0, 0.0],
            [0.0, 0.073284165, 0.049123845],
        ],
    ),
    "gspo": (
        -0.076078412,
        [
            [-0.080601342, -0.080601342, -0.080601342],
            [0.0, 0.0, 0.0],
            [0.135725613, 0.0, 0.0],
            [0.0, 0.0, 0.0],
        ],
    ),
    "cispo": (
        0.174316388,
        [
            [-0.1657583, -0.122796769, -0.060979071],
            [-0.065850509, -0.133333333, 0.0],
            [0.060322495, 0.0, 0.0],
            [0.029750688, 0.162853701, 0.1091641],
        ],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_trl_and_verl(name):
    """A formula that is only ours."""
    logp, old_logp, adv, mask = oracle.inputs()
    low, high = oracle.CLIPS[name]
    knobs = {"drgrpo": {"clip": low}, "gspo": {"clip_low": low, "clip_high": high}}
    knobs["cispo"] = {"clip_high": high}
    weight = variants.of(oracle.MAX_NEW_TOKENS)[name].token_weight(mask)
    value, grad, _ = run(OF[name].loss, logp, old_logp, adv[:, None], weight, **knobs[name])
    expected, slopes = ORACLE[name]
    assert value == pytest.approx(expected, rel=1e-6)  # weight is float32
    torch.testing.assert_close(grad, torch.tensor(slopes).double(), rtol=1e-6, atol=1e-9)


# ---- where one is another ------------------------------------------------------------------------


def test_gspo_of_one_token_is_the_token_clip():
    """A sequence's ratio that is not its token's where there is one."""
    _, logp, old, adv = random_step(1, T=1)
    weight = grpo.token_weight(torch.ones(6, 1).bool())
    clips = {"clip_low": 0.1, "clip_high": 0.3}
    one, two = (
        run(loss, logp, old, adv, weight, **clips, **more)
        for loss, more in ((variants.gspo_loss, {}), (dapo.loss, {"dual_clip": None}))
    )
    assert one[0] == two[0] and torch.equal(one[1], two[1]) and one[2] == two[2]
    assert 0 < one[2]["clipfrac"] < 1


@pytest.mark.parametrize(("name", "like"), [("gspo", grpo), ("cispo", dapo)])
def test_on_policy_all_push_alike(name, like):
    """At ratio 1 each is REINFORCE: a factor, a sign or an old_logp left in the graph shows."""
    mask, logp, _, adv = random_step(2)
    weight = OF[name].token_weight(mask).double()
    assert torch.equal(weight, like.token_weight(mask).double())
    _, grad, info = run(OF[name].loss, logp, logp.detach(), adv, weight)
    torch.testing.assert_close(grad, run(like.loss, logp, logp, adv, weight)[1])
    torch.testing.assert_close(grad, -weight * adv)
    assert (info["clipfrac"], info["ratio"]) == (0.0, pytest.approx(weight.sum().item()))


def test_old_logp_may_be_logp_itself():
    """The gradient of a ratio of one thing to itself: none."""
    mask, logp, _, adv = random_step(2)
    for name in NAMES:
        x = logp.clone().requires_grad_()
        value, _ = OF[name].loss(x, x, adv, OF[name].token_weight(mask))
        assert torch.autograd.grad(value, x)[0][mask].abs().min() > 0


def test_drgrpo_of_full_answers_is_grpo_without_std():
    """Another constant than L: where all lengths are L, both means are GRPO's."""
    _, logp, old, adv = random_step(3)
    full = torch.ones(6, LIMIT).bool()
    weight = OF["drgrpo"].token_weight(full)
    torch.testing.assert_close(weight, grpo.token_weight(full))
    torch.testing.assert_close(weight, dapo.token_weight(full))
    assert OF["drgrpo"].loss is grpo.loss
    reward = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OF["drgrpo"].advantage(reward, True), grpo.advantage(reward, False))


def test_cispo_below_its_bound_pushes_like_dapo_without_a_clip():
    """A weight other than r A: below the bound the gradient is that of r A itself."""
    mask, logp, old, adv = random_step(4)
    weight, wide = dapo.token_weight(mask), {"clip_low": 0.99, "clip_high": 99.0}
    grad = run(variants.cispo_loss, logp, old, adv, weight, clip_high=99.0)[1]
    like = run(dapo.loss, logp, old, adv, weight, dual_clip=None, **wide)[1]
    torch.testing.assert_close(grad, like)


# ---- the contract of a loss ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_micro_batches_change_nothing(name, size):
    """Means of micro-batch means: a known, common fault, worst with unequal lengths."""
    mask, x, old, adv = random_step(7)
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)  # a shared parameter
    weight = OF[name].token_weight(mask).double()  # so that only the order of the sum can differ
    sums, grad = {}, 0.0
    for part in torch.arange(6).split(size):
        args = (theta * x[part], old[part], adv[part], weight[part])
        value, info = OF[name].loss(*args, **CLIPS[name])
        grad += torch.autograd.grad(value, theta)[0].item()
        sums = {key: sums.get(key, 0.0) + info[key] for key in info}
    value, info = OF[name].loss(theta * x, old, adv, weight, **CLIPS[name])
    assert grad == pytest.approx(torch.autograd.grad(value, theta)[0].item(), rel=1e-12)
    assert sums == pytest.approx(info, rel=1e-12) and 0 < info["clipfrac"] < weight.sum()


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_rows(name):
    """A sum over samples in place of tokens where tensors are [b, G, T], as in the loop."""
    mask, *args = random_step(5)
    args += [OF[name].token_weight(mask)]
    value, grad, info = run(OF[name].loss, *args, **CLIPS[name])
    grouped = [x.reshape(2, 3, -1) for x in args]
    value2, grad2, info2 = run(OF[name].loss, *grouped, **CLIPS[name])
    assert value2 == pytest.approx(value) and info2 == pytest.approx(info)
    torch.testing.assert_close(grad2.reshape(6, -1), grad)
    torch.testing.assert_close(OF[name].token_weight(mask.view(2, 3, -1)), grouped[3])


@pytest.mark.parametrize("name", NAMES)
def test_garbage_in_masked_places_does_not_leak(name):
    """mask * inf = NaN, or padding in the mean of a sequence's log ratios."""
    mask, *clean = random_step(3)
    weight, loss = OF[name].token_weight(mask), OF[name].loss
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30, 0])
    dirty = [torch.where(mask, x, junk.roll(k)) for k, x in enumerate(clean)]  # adv too
    value, grad, info = run(loss, *clean, weight)
    value2, grad2, info2 = run(loss, *dirty, weight)
    assert value == value2 and info == info2 and torch.equal(grad, grad2)
    assert (grad2[~mask] == 0).all() and (grad2[mask] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_without_weight_is_zero(name):
    """0 / 0 where a rank goes along with a group of weight 0, or every answer is empty."""
    nothing = torch.zeros(2, 3)
    value, grad, info = run(OF[name].loss, nothing - 1, nothing, torch.ones(2, 1), nothing)
    assert value == 0 and (grad == 0).all() and set(info.values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_inputs_unchanged_and_constants_constant(name):
    """An in-place write, a gradient into a constant, or adv [N, 1] and [N, T] that disagree."""
    mask, *inputs = random_step(5)
    logp, old, adv = (x.requires_grad_() for x in inputs)
    copies, weight = [x.detach().clone() for x in inputs], OF[name].token_weight(mask)
    narrow, _ = OF[name].loss(logp, old, adv, weight)
    wide, _ = OF[name].loss(logp, old, adv.expand(6, LIMIT), weight)
    narrow.backward()
    assert narrow.item() == wide.item()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_extreme_ratios_stay_finite(name, shift):
    """exp overflows to inf in float32, and inf * 0 is NaN."""
    logp, ones = torch.tensor([[shift]]), torch.ones(1, 1)
    for adv in (ones, -ones):
        value, grad, info = run(OF[name].loss, logp, 0 * ones, adv, ones)
        assert grad.isfinite().all() and all(map(math.isfinite, (value, *info.values())))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name):
    """Ratios in bf16 have steps of 1/128, twenty times GSPO's clip."""
    mask, *args = random_step(2)
    weight, half = OF[name].token_weight(mask), [x.bfloat16() for x in args]
    value, grad, info = run(OF[name].loss, *half, weight)
    value2, grad2, info2 = run(OF[name].loss, *(x.float() for x in half), weight)
    assert value == value2 and info == info2 and torch.equal(grad, grad2.bfloat16())


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_run_records_just_what_its_loss_takes(name):
    """A knob that --algo refuses, one recorded as if it were used, or two defaults that differ."""
    record = config.Config(algo=name).record()
    clips = {"clip", "beta", "clip_low", "clip_high", "dual_clip"}
    assert clips & record.keys() == set(OF[name].KNOBS)
    defaults = inspect.signature(OF[name].loss).parameters
    assert all(record[knob] == defaults[knob].default for knob in OF[name].KNOBS)
    assert ("scale" in record) == (name != "drgrpo")
