"""DAPO against hand-computed numbers and a slow twin. Docstrings name the faults prevented."""

import math

import pytest
import torch

import dapo
import grpo

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def run(logp, old_logp, adv, weight, **options):
    """Value, gradient in logp, and log of one call."""
    logp = logp.clone().requires_grad_()
    value, info = dapo.loss(logp, old_logp, adv, weight, **options)
    (grad,) = torch.autograd.grad(value, logp)
    return value.item(), grad, info


def one(adv, ratio, **options):
    """The same for a single token of weight 1: numbers a person can check."""
    value, grad, info = run(row(math.log(ratio)), row(0.0), row(adv), row(1.0), **options)
    return value, grad.item(), info["clipfrac"]


def random_step(seed, N=6, T=5):
    """Unequal lengths (row 0 is empty), one advantage a row, some ratios past a dual clip of 2."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=g)  # [N, T]
    mask[0] = False
    logp, noise = torch.randn(2, N, T, generator=g, dtype=torch.float64)
    adv = torch.randn(N, 1, generator=g, dtype=torch.float64)
    return mask, logp - 3, logp - 3 + 0.8 * noise, adv


# ---- token_weight --------------------------------------------------------------------------------


def test_advantage_is_grpos():
    """A second copy that drifts apart."""
    assert dapo.advantage is grpo.advantage


def test_token_mean_by_hand():
    """Sequence mean, a mean over the padded width, or weight on an empty row."""
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    # 1 + 3 + 0 + 2 = 6 tokens
    torch.testing.assert_close(dapo.token_weight(mask), mask * (1 / 6))
    assert dapo.token_weight(mask).dtype == torch.float32


def test_step_without_a_token():
    """0 / 0 when every row is empty: a NaN step in place of none."""
    weight = dapo.token_weight(torch.zeros(2, 3, dtype=torch.bool))
    value, grad, _ = run(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1), weight)
    assert value == 0 and (weight == 0).all() and (grad == 0).all()


# ---- loss: one token -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adv", "ratio", "value", "grad", "cut"),
    [
        (2.0, 1.5, -2.56, 0.0, 1),  # min(3.0, 1.28 * 2) = 2.56: far enough up, no further push
        (2.0, 1.25, -2.5, -2.5, 0),  # clip-higher: GRPO's 1.2 would have cut it
        (2.0, 0.5, -1.0, -1.0, 0),  # min(1.0, 0.8 * 2) = 1.0: grew rare, full push, -r A
        (-2.0, 1.5, 3.0, 3.0, 0),  # min(-3.0, 1.28 * -2) = -3.0: grew common, full push down, -r A
        (-2.0, 0.5, 1.6, 0.0, 1),  # min(-1.0, 0.8 * -2) = -1.6: far enough down, no further push
        (-2.0, 0.75, 1.6, 0.0, 1),  # the low side stays at 0.2: 0.28 would have let it pass
        (0.0, 1.5, 0.0, 0.0, 0),  # a dead group is not "clipped"
    ],
)
def test_clip_quadrants(adv, ratio, value, grad, cut):
    """The two clip widths swapped, max for min, the clip inverted for A < 0, a lost minus sign."""
    assert one(adv, ratio) == pytest.approx((value, grad, cut), abs=1e-12)


@pytest.mark.parametrize(
    ("adv", "ratio", "dual_clip", "value", "grad", "cut"),
    [
        (-2.0, 20.0, 10.0, 20.0, 0.0, 1),  # max(min(-40, -2.56), 10 * -2) = -20: on the floor
        (-2.0, 5.0, 10.0, 10.0, 10.0, 0),  # -10 is above the floor of -20: full push down
        (-2.0, 20.0, None, 40.0, 40.0, 0),  # off: the bottomless r A
        (-2.0, 5.0, 3.0, 6.0, 0.0, 1),  # verl's 3: max(-10, -6)
        (2.0, 20.0, 10.0, -2.56, 0.0, 1),  # A > 0 has no floor: 10 * 2 = 20 would be a jackpot
        (2.0, 0.01, 10.0, -0.02, -0.02, 0),
        (-2.0, 0.5, 10.0, 1.6, 0.0, 1),  # far above the floor: only the ordinary clip
    ],
)
def test_dual_clip(adv, ratio, dual_clip, value, grad, cut):
    """A floor for A > 0 too, a floor that is a ceiling, None that still clips."""
    assert one(adv, ratio, dual_clip=dual_clip) == pytest.approx((value, grad, cut), abs=1e-12)


def test_clip_widths_are_arguments():
    """Constants that ignore the configuration."""
    assert one(1.0, 1.9, clip_high=0.5)[0] == pytest.approx(-1.5)
    assert one(-1.0, 0.1, clip_low=0.5)[0] == pytest.approx(0.5)


def test_dual_clip_default_is_ten():
    """A default that drifts from the paper's script."""
    assert one(-1.0, 20.0)[0] == pytest.approx(10.0)


@pytest.mark.parametrize("adv", [1.0, -1.0])
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("dual_clip", [10.0, None])
def test_extreme_ratios_stay_finite(adv, shift, dual_clip):
    """exp overflows to inf in float32 and the clip's zero gradient becomes 0 * inf = NaN."""
    logp, ones = torch.tensor([[shift]]), torch.ones(1, 1)
    value, grad, _ = run(logp, 0 * ones, adv * ones, ones, dual_clip=dual_clip)
    assert math.isfinite(value) and grad.item() == 0


# ---- loss: rows and steps ------------------------------------------------------------------------


def test_on_policy_value_is_minus_mean_and_gradient_is_reinforce():
    """A loss near 0 taken for "nothing to learn"; old_logp left in the graph, which kills it."""
    logp, adv = row(-1, -2, -3, -4).view(4, 1), row(1, -2, 0.5, 0.5).view(4, 1)
    weight = dapo.token_weight(torch.ones(4, 1, dtype=torch.bool))
    logp.requires_grad_()
    value, info = dapo.loss(logp, logp, adv, weight)  # old_logp is logp itself: must be constant
    assert value.item() == 0  # -(1 - 2 + 0.5 + 0.5) / 4
    (grad,) = torch.autograd.grad(value, logp)
    torch.testing.assert_close(grad, -adv / 4)
    sides = {"clipfrac_low": 0.0, "clipfrac_high": 0.0}
    assert info == {"clipfrac": 0.0, **sides, "ratio": 1.0, "kl": 0.0}


def test_every_token_weighs_the_same():
    """Sequence mean in place of token mean."""
    weight = dapo.token_weight(torch.tensor([[1, 0, 0], [1, 1, 1]]).bool())
    value, _, _ = run(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[3.0], [1.0]]), weight)
    assert value == pytest.approx(-1.5)  # -(3 + 1 + 1 + 1) / 4; the sequence mean is -2


def test_log_is_weighted():
    """A plain mean over the padded width, or a dual clip that the log does not see."""
    # ratios 2, 20 and padding; A = -1: only the 20 is cut, by the floor; weights 1/4, 3/4, 0
    logp = row(math.log(2), math.log(20), 9)
    _, _, info = run(logp, row(0, 0, 0), row(-1.0), row(0.25, 0.75, 0))
    sides = {"clipfrac_low": 0.75, "clipfrac_high": 0.0}
    ratio = 0.25 * 2 + 0.75 * 20
    assert info == pytest.approx({"clipfrac": 0.75, **sides, "ratio": ratio, "kl": 0.0})
    assert all(type(x) is float for x in info.values())


def test_kl_is_logged_and_never_trained_on():
    """A reference that changes DAPO's objective, which has no KL."""
    logp, ref = row(-1.0, -2.0), row(-1.0 + math.log(2), -2.0)
    inputs = logp, logp, row(1.0), row(0.5, 0.5)
    value, grad, info = run(*inputs, ref_logp=ref)
    assert (value, grad.tolist()) == (run(*inputs)[0], run(*inputs)[1].tolist())
    assert info["kl"] == pytest.approx(0.5 * (2 - math.log(2) - 1))  # exp(d) - d - 1, d = ln 2, 0


@pytest.mark.parametrize("seed", range(3))
def test_with_equal_clips_and_no_dual_clip_it_is_grpo(seed):
    """Two copies of one line that drift apart."""
    mask, logp, old, adv = random_step(seed)
    weight = grpo.token_weight(mask)
    value, grad, info = run(logp, old, adv, weight, clip_low=0.3, clip_high=0.3, dual_clip=None)
    logp.requires_grad_()
    value2, info2 = grpo.loss(logp, old, adv, weight, clip=0.3)
    assert value == value2.item() and info == info2
    assert torch.equal(grad, torch.autograd.grad(value2, logp)[0])


def twin(logp, old_logp, adv, mask, low, high, c):
    """The paper's formula, read aloud: lists, loops and math."""
    total, tokens = 0.0, 0
    for i, mask_row in enumerate(mask):
        for t, is_token in enumerate(mask_row):
            if is_token:
                r = math.exp(logp[i][t] - old_logp[i][t])
                push = min(r * adv[i][0], min(max(r, 1 - low), 1 + high) * adv[i][0])
                if c is not None and adv[i][0] < 0:
                    push = max(push, c * adv[i][0])
                total, tokens = total + push, tokens + 1
    return -total / tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dual_clip", [2.0, None])
def test_slow_twin(seed, dual_clip):
    """Any slip in the tensor code, in value or gradient (central differences of the twin)."""
    mask, logp, old, adv = random_step(seed)
    weight = dapo.token_weight(mask).double()
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": dual_clip}
    value, grad, _ = run(logp, old, adv, weight, **options)
    rest = (old.tolist(), adv.tolist(), mask.tolist(), *options.values())
    assert value == pytest.approx(twin(logp.tolist(), *rest), rel=1e-6)  # weight was float32
    for i, t in [(i, t) for i in range(6) for t in range(5)]:
        step = torch.zeros_like(logp)
        step[i, t] = 1e-5
        slope = twin((logp + step).tolist(), *rest) - twin((logp - step).tolist(), *rest)
        assert grad[i, t].item() == pytest.approx(slope / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_micro_batches_change_nothing(size):
    """Means of micro-batch means: a known, common fault, worst with unequal lengths."""
    mask, x, old, adv = random_step(7)
    theta = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)  # a shared parameter
    # float64, so that only the order of the sum can differ
    weight = dapo.token_weight(mask).double()
    sums, grad = {}, 0.0
    for part in torch.arange(6).split(size):
        value, info = dapo.loss(theta * x[part], old[part], adv[part], weight[part])
        grad += torch.autograd.grad(value, theta)[0].item()
        sums = {key: sums.get(key, 0.0) + info[key] for key in info}
    value, info = dapo.loss(theta * x, old, adv, weight)
    assert grad == pytest.approx(torch.autograd.grad(value, theta)[0].item(), rel=1e-12)
    assert sums == pytest.approx(info, rel=1e-12)


def test_garbage_in_masked_places_does_not_leak():
    """mask * inf = NaN: one padded position poisons the whole step."""
    mask, *clean = random_step(3)
    weight, junk = dapo.token_weight(mask), torch.tensor([math.nan, math.inf, -math.inf, 1e30, 0])
    dirty = [torch.where(mask, x, junk.roll(k)) for k, x in enumerate(clean)]  # adv too
    value, grad, info = run(*clean, weight)
    value2, grad2, info2 = run(*dirty, weight)
    assert value == value2 and info == info2 and torch.equal(grad, grad2)
    assert (grad2[~mask] == 0).all() and (grad2[mask] != 0).any()


def test_broadcast_and_inputs_unchanged():
    """adv [N, 1] and [N, T] disagree, an in-place write, or a gradient into a constant."""
    mask, *inputs = random_step(5)
    logp, old, adv = (x.requires_grad_() for x in inputs)
    copies, weight = [x.detach().clone() for x in inputs], dapo.token_weight(mask)
    narrow, _ = dapo.loss(logp, old, adv, weight)
    wide, _ = dapo.loss(logp, old, adv.expand(6, 5), weight)
    narrow.backward()
    assert narrow.item() == wide.item()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Ratios in bf16 have steps of 1/128: a policy that moved by 0.3 % seems not to have."""
    mask, *args = random_step(2)
    weight, half = dapo.token_weight(mask), [x.to(dtype) for x in args]
    value, grad, info = run(*half, weight)
    value2, grad2, info2 = run(*(x.float() for x in half), weight)
    assert value == value2 and info == info2 and torch.equal(grad, grad2.to(dtype))


@CUDA
def test_gpu_agrees_with_cpu():
    """A tensor made on the wrong device."""
    mask, *args = random_step(4)
    value, grad, info = run(*(x.cuda() for x in args), dapo.token_weight(mask.cuda()))
    value2, grad2, info2 = run(*args, dapo.token_weight(mask))
    assert value == pytest.approx(value2) and info == pytest.approx(info2)
    torch.testing.assert_close(grad.cpu(), grad2)
    assert dapo.keep(torch.tensor([[1.7] * 8, [0.0] * 7 + [1.0]]).cuda()).tolist() == [False, True]


# ---- dynamic sampling and the overlong penalty ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_keep_groups_some_but_not_all_right(dtype):
    """All-right groups kept, all-wrong groups kept, or booleans that cannot be subtracted."""
    exact = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0]]).to(dtype)
    kept = dapo.keep(exact)
    assert kept.tolist() == [False, False, True, True]
    assert kept.dtype == torch.bool


def test_keep_on_the_shaped_reward():
    """np.std > 0, which keeps three rewards of 0.7; a threshold that drops small differences."""
    reward = row(0.7, 0.7, 0.7, -1.0, -0.9, -0.8, 0.0, 1e-6, 0.0, 0.0, 2e-6, 0.0).view(4, 3)
    # 0.7s are dead, wrong answers that differ are not, a spread of 1e-6 is, one of 2e-6 is not
    assert dapo.keep(reward).tolist() == [False, True, False, True]
    assert dapo.keep(torch.full((2, 8), 1.7)).tolist() == [False, False]


def test_keep_shows_a_broken_reward():
    """A NaN that is sampled away as a dead group, and never seen."""
    assert dapo.keep(torch.tensor([[math.nan, 1.0], [1.0, 1.0]])).tolist() == [True, False]


def test_keep_is_where_the_advantage_lives():
    """Two thresholds that disagree: groups kept for nothing, or taught and thrown away."""
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(-9, 0, 50, dtype=torch.float64)[:, None]
    reward = 1.7 + scale * torch.randn(50, 4, generator=g, dtype=torch.float64)
    kept = dapo.keep(reward)
    assert torch.equal(kept, (dapo.advantage(reward) != 0).any(dim=1))
    assert 0 < kept.sum() < 50


def test_overlong_penalty_with_the_papers_numbers():
    """A sign error, a penalty that starts at max_length, or one that grows beyond -1."""
    length = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 99999])
    # 20480 - 4096 = 16384 is free; one token more costs 1 / 4096; half way is 18432
    expected = torch.tensor([0, 0, -1 / 4096, -0.5, -1, -1, -1])
    assert torch.equal(dapo.overlong_penalty(length, 20480, 4096), expected)


def test_overlong_penalty_without_a_soft_zone():
    """0 / 0 = NaN at exactly max_length."""
    length = torch.tensor([[0, 99], [100, 101]])
    assert dapo.overlong_penalty(length, 100, 0).tolist() == [[0, 0], [0, -1]]
    assert dapo.overlong_penalty(length, 100, 1).tolist() == [[0, 0], [-1, -1]]


def test_overlong_penalty_of_an_int():
    """A length that has to be a tensor."""
    assert dapo.overlong_penalty(75, 100, 50).item() == -0.5
