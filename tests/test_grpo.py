"""GRPO against hand-computed numbers and a slow twin. Docstrings name the faults prevented."""

import math

import pytest
import torch

import grpo

LN2 = math.log(2)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def run(logp, old_logp, adv, weight, **options):
    """Value, gradient in logp, and log of one call."""
    logp = logp.clone().requires_grad_()
    value, info = grpo.loss(logp, old_logp, adv, weight, **options)
    (grad,) = torch.autograd.grad(value, logp)
    return value.item(), grad, info


def one(adv, ratio, **options):
    """The same for a single token of weight 1: numbers a person can check."""
    value, grad, info = run(row(math.log(ratio)), row(0.0), row(adv), row(1.0), **options)
    return value, grad.item(), info["clipfrac"]


def random_step(seed, N=6, T=5):
    """Unequal lengths (row 0 is empty), one advantage a row, ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=g)  # [N, T]
    mask[0] = False
    logp, noise, other = torch.randn(3, N, T, generator=g, dtype=torch.float64)
    adv = torch.randn(N, 1, generator=g, dtype=torch.float64)
    return mask, logp - 3, logp - 3 + 0.4 * noise, adv, logp - 3 + 0.4 * other


# ---- advantage -----------------------------------------------------------------------------------


def test_advantage_by_hand():
    """Population std, a forgotten eps, or groups that see each other."""
    adv = grpo.advantage(row(1, 2, 3, 0, 0, 3).view(2, 3))
    # group 1: mean 2, deviations -1 0 1, variance (1 + 0 + 1) / 2 = 1, std 1
    # group 2: mean 1, deviations -1 -1 2, variance (1 + 1 + 4) / 2 = 3, std sqrt 3
    a, b = 1 / (1 + 1e-4), 1 / (math.sqrt(3) + 1e-4)
    torch.testing.assert_close(adv, row(-a, 0, a, -b, -b, 2 * b).view(2, 3), rtol=1e-12, atol=0)


def test_eps_is_added_to_the_std():
    """eps under the root, on the variance, or another eps than 1e-4."""
    # rewards 0 and 2e-4: deviations -+1e-4, std sqrt(2) 1e-4, A = 1e-4 / (sqrt(2) 1e-4 + 1e-4)
    expected = 1 / (math.sqrt(2) + 1)
    torch.testing.assert_close(grpo.advantage(row(0, 2e-4)), row(-expected, expected))


def test_without_scale_only_the_mean_goes():
    """Dr. GRPO that still divides, or that divides by eps."""
    assert grpo.advantage(row(1, 2, 6), scale=False).tolist() == [[-2, -1, 3]]


@pytest.mark.parametrize("reward", [1.7, -0.3, 0.1, 2.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_teach_exactly_nothing(reward, dtype):
    """Rounding noise over rounding noise: eight 1.7s in float32 with eps 1e-6 give A = 0.106."""
    for scale in (True, False):
        assert (grpo.advantage(torch.full((2, 8), reward, dtype=dtype), scale) == 0).all()


def test_dead_up_to_a_spread_of_1e_6():
    """Noise of 1e-7 between equal answers blown up, or a small true difference thrown away."""
    assert (grpo.advantage(row(0, 1e-6)) == 0).all()  # max - min is exactly 1e-6
    assert (grpo.advantage(row(1.7, 1.7 + 9e-7, 1.7)) == 0).all()
    # rewards 0 and 2e-6: deviations -+1e-6, std sqrt(2) 1e-6, so A = 1 / (sqrt(2) + 100)
    expected = 1 / (math.sqrt(2) + 100)
    torch.testing.assert_close(grpo.advantage(row(0, 2e-6)), row(-expected, expected))


def test_one_dead_group_leaves_its_neighbour_alone():
    """A test on the whole batch instead of on each group."""
    adv = grpo.advantage(torch.tensor([[1.7] * 3, [1.0, 2.0, 3.0]]))
    assert adv[0].tolist() == [0, 0, 0] and adv[1, 2] > 0.99


@pytest.mark.filterwarnings("error")
def test_group_of_one_and_empty_batch():
    """0 / 0 in the sample std: NaN, or a warning about degrees of freedom."""
    assert grpo.advantage(torch.tensor([[3.0], [-1.0]])).tolist() == [[0.0], [0.0]]
    assert grpo.advantage(torch.zeros(0, 4)).shape == (0, 4)


def test_advantage_dtypes_and_inputs():
    """Integer rewards that truncate A, float64 that leaks into a float32 loss, in-place writes."""
    assert grpo.advantage(torch.tensor([[0, 1]])).dtype == torch.float32
    assert grpo.advantage(torch.tensor([[0, 1]]))[0, 1].item() == pytest.approx(0.7070, abs=1e-4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        reward = torch.tensor([[0.5, 1.5, 3.0]], dtype=dtype)
        assert grpo.advantage(reward).dtype == dtype
        assert reward.tolist() == [[0.5, 1.5, 3.0]]


def test_nan_reward_is_loud():
    """A broken reward taken for a dead group, and so never seen."""
    adv = grpo.advantage(row(math.nan, 1, 2, 3).view(2, 2))
    assert adv[0].isnan().all() and adv[1].isfinite().all()


# ---- token_weight and kl -------------------------------------------------------------------------


def test_sequence_mean_by_hand():
    """Token mean, a mean over the padded width, or 0 / 0 in an empty row."""
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    # N = 4 rows of 1, 3, 0 and 2 tokens: 1 / (4 * 1), 1 / (4 * 3), 0, 1 / (4 * 2)
    expected = torch.tensor([[1 / 4], [1 / 12], [0], [1 / 8]]) * mask
    torch.testing.assert_close(grpo.token_weight(mask), expected)
    assert grpo.token_weight(mask).dtype == torch.float32


def test_step_without_a_token():
    """0 / 0 when every row is empty: a NaN step in place of none."""
    weight = grpo.token_weight(torch.zeros(2, 3, dtype=torch.bool))
    value, grad, _ = run(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1), weight)
    assert value == 0 and (weight == 0).all() and (grad == 0).all()


def test_k3_by_hand():
    """d with the wrong sign, a missing -1, or the k1 and k2 estimators."""
    logp = row(-1.0, -1.0, -1.0).requires_grad_()
    k3 = grpo.kl(logp, row(-1 + LN2, -1 - LN2, -1.0))
    # d = ln 2: 2 - ln 2 - 1;   d = -ln 2: 1/2 + ln 2 - 1;   d = 0: 1 - 0 - 1
    torch.testing.assert_close(k3, row(1 - LN2, LN2 - 0.5, 0.0))
    (grad,) = torch.autograd.grad(k3.sum(), logp)
    torch.testing.assert_close(grad, row(1 - 2, 1 - 0.5, 0.0))  # 1 - exp(d)


def test_k3_is_never_negative():
    """exp(d) - 1 in float32 rounds a small d away: a quarter of such values came out below 0."""
    g = torch.Generator().manual_seed(0)
    d = torch.cat([torch.randn(10_000, generator=g) * s for s in (1e-8, 1e-4, 1e-2, 1, 5)])
    assert (grpo.kl(torch.zeros_like(d), d) >= 0).all()
    assert grpo.kl(torch.zeros(1), torch.tensor([1e-3])).item() == pytest.approx(5e-7, rel=1e-3)


def test_k3_widens_bf16():
    """k3 in bf16: the d^2 / 2 of a small d needs more than 8 bits."""
    a, b = torch.tensor([-2.015625, -2.0]).bfloat16()
    assert grpo.kl(a, b).dtype == torch.float32
    # d = 1/64: d^2 / 2 + d^3 / 6 = 1.2207e-4 + 6.4e-7
    assert grpo.kl(a, b).item() == pytest.approx(1.2271e-4, rel=1e-3)


# ---- loss: one token -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adv", "ratio", "value", "grad", "cut"),
    [
        (2.0, 1.5, -2.4, 0.0, 1),  # min(3.0, 1.2 * 2) = 2.4: far enough up, no further push
        (2.0, 0.5, -1.0, -1.0, 0),  # min(1.0, 0.8 * 2) = 1.0: grew rare, full push, -r A
        (-2.0, 1.5, 3.0, 3.0, 0),  # min(-3.0, 1.2 * -2) = -3.0: grew common, full push down, -r A
        (-2.0, 0.5, 1.6, 0.0, 1),  # min(-1.0, 0.8 * -2) = -1.6: far enough down, no further push
        (2.0, 1.1, -2.2, -2.2, 0),  # inside the clip both are r A
        (-2.0, 0.9, 1.8, 1.8, 0),
        (0.0, 1.5, 0.0, 0.0, 0),  # a dead group is not "clipped"
    ],
)
def test_clip_quadrants(adv, ratio, value, grad, cut):
    """max for min, clip bounds swapped, the clip inverted for A < 0, a forgotten minus sign."""
    assert one(adv, ratio) == pytest.approx((value, grad, cut), abs=1e-12)


def test_clip_width_is_an_argument():
    """A constant 0.2 that ignores the configuration."""
    assert one(1.0, 1.4, clip=0.5)[0] == pytest.approx(-1.4)
    assert one(1.0, 1.4, clip=0.3)[0] == pytest.approx(-1.3)
    assert one(-1.0, 0.4, clip=0.5)[0] == pytest.approx(0.5)


def test_kl_is_added_not_subtracted():
    """A sign that rewards leaving the reference, or a KL inside the clip."""
    # r = 1.5, A = 2 is clipped: -2.4 and no gradient; k3 at d = ln 2 is 1 - ln 2, its gradient -1
    ref = row(math.log(1.5) + LN2)
    value, grad, _ = one(2.0, 1.5, ref_logp=ref, beta=0.1)
    assert (value, grad) == pytest.approx((-2.4 + 0.1 * (1 - LN2), 0.1 * -1))


def test_kl_is_logged_without_beta():
    """A log scaled by beta, a KL that trains at beta 0, or a made-up KL without a reference."""
    value, grad, info = run(row(0.0), row(0.0), row(1.0), row(1.0), ref_logp=row(LN2))
    assert (value, grad.item()) == (-1.0, -1.0) and info["kl"] == pytest.approx(1 - LN2)
    assert run(row(0.3), row(0.0), row(1.0), row(1.0))[2]["kl"] == 0.0


def test_beta_without_a_reference_is_refused():
    """A flag that does nothing."""
    with pytest.raises(ValueError, match="ref_logp"):
        one(1.0, 1.0, beta=0.1)


@pytest.mark.parametrize("adv", [1.0, -1.0])
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_extreme_ratios_stay_finite(adv, shift):
    """exp overflows to inf in float32 and the clip's zero gradient becomes 0 * inf = NaN."""
    value, grad, _ = run(torch.tensor([[shift]]), torch.zeros(1, 1), row(adv), torch.ones(1, 1))
    assert math.isfinite(value) and grad.item() == 0


# ---- loss: rows and steps ------------------------------------------------------------------------


def test_on_policy_value_is_minus_mean_and_gradient_is_reinforce():
    """A loss near 0 taken for "nothing to learn"; old_logp left in the graph, which kills it."""
    logp, adv = row(-1, -2, -3, -4).view(4, 1), row(1, -2, 0.5, 0.5).view(4, 1)
    weight = grpo.token_weight(torch.ones(4, 1, dtype=torch.bool))
    logp.requires_grad_()
    value, info = grpo.loss(logp, logp, adv, weight)  # old_logp is logp itself: must be constant
    assert value.item() == 0  # -(1 - 2 + 0.5 + 0.5) / 4
    (grad,) = torch.autograd.grad(value, logp)
    torch.testing.assert_close(grad, -adv / 4)
    sides = {"clipfrac_low": 0.0, "clipfrac_high": 0.0}
    assert info == {"clipfrac": 0.0, **sides, "ratio": 1.0, "kl": 0.0}


def test_long_and_short_rows_weigh_the_same():
    """Token mean in place of sequence mean."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    weight = grpo.token_weight(mask)
    value, _, _ = run(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[3.0], [1.0]]), weight)
    assert value == pytest.approx(-2.0)  # -(3 + (1 + 1 + 1) / 3) / 2; the token mean is -1.5


def test_log_is_weighted():
    """A plain mean over the padded width."""
    # ratios 2, 1 and padding; A = 1, so the 2 is cut; weights 1/4, 3/4, 0; d of k3: ln 2, 0
    logp, ref = row(LN2, 0, 9), row(2 * LN2, 0, 0)
    _, _, info = run(logp, row(0, 0, 0), row(1.0), row(0.25, 0.75, 0), ref_logp=ref)
    sides = {"clipfrac_low": 0.0, "clipfrac_high": 0.25}
    assert info == pytest.approx({"clipfrac": 0.25, **sides, "ratio": 1.25, "kl": 0.25 * (1 - LN2)})
    assert all(type(x) is float for x in info.values())


def twin(logp, old_logp, adv, mask, ref_logp, clip, beta):
    """The paper's formula, read aloud: lists, loops and math."""
    total = 0.0
    for i, tokens in enumerate(mask):
        length = sum(tokens)
        for t, is_token in enumerate(tokens):
            if is_token:
                r = math.exp(logp[i][t] - old_logp[i][t])
                d = ref_logp[i][t] - logp[i][t]
                push = min(r * adv[i][0], min(max(r, 1 - clip), 1 + clip) * adv[i][0])
                total += (push - beta * (math.exp(d) - d - 1)) / length
    return -total / len(mask)


@pytest.mark.parametrize("seed", range(5))
def test_slow_twin(seed):
    """Any slip in the tensor code, in value or gradient (central differences of the twin)."""
    mask, logp, old, adv, ref = random_step(seed)
    weight = grpo.token_weight(mask).double()
    value, grad, _ = run(logp, old, adv, weight, clip=0.15, ref_logp=ref, beta=0.3)
    rest = (old.tolist(), adv.tolist(), mask.tolist(), ref.tolist(), 0.15, 0.3)
    assert value == pytest.approx(twin(logp.tolist(), *rest), rel=1e-6)  # weight was float32
    for i, t in [(i, t) for i in range(6) for t in range(5)]:
        step = torch.zeros_like(logp)
        step[i, t] = 1e-5
        slope = twin((logp + step).tolist(), *rest) - twin((logp - step).tolist(), *rest)
        assert grad[i, t].item() == pytest.approx(slope / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_micro_batches_change_nothing(size):
    """Means of micro-batch means: a known, common fault, worst with unequal lengths."""
    mask, x, old, adv, ref = random_step(7)
    theta = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)  # a shared parameter
    # float64, so that only the order of the sum can differ
    weight = grpo.token_weight(mask).double()
    sums, grad = {}, 0.0
    for part in torch.arange(6).split(size):
        args = (theta * x[part], old[part], adv[part], weight[part])
        value, info = grpo.loss(*args, ref_logp=ref[part], beta=0.3)
        grad += torch.autograd.grad(value, theta)[0].item()
        sums = {key: sums.get(key, 0.0) + info[key] for key in info}
    value, info = grpo.loss(theta * x, old, adv, weight, ref_logp=ref, beta=0.3)
    assert grad == pytest.approx(torch.autograd.grad(value, theta)[0].item(), rel=1e-12)
    assert sums == pytest.approx(info, rel=1e-12)


def test_garbage_in_masked_places_does_not_leak():
    """mask * inf = NaN: one padded position poisons the whole step."""
    mask, *clean = random_step(3)
    weight, junk = grpo.token_weight(mask), torch.tensor([math.nan, math.inf, -math.inf, 1e30, 0])
    dirty = [torch.where(mask, x, junk.roll(k)) for k, x in enumerate(clean)]  # adv too
    logp, old, adv, ref = clean
    value, grad, info = run(logp, old, adv, weight, ref_logp=ref, beta=0.3)
    logp, old, adv, ref = dirty
    value2, grad2, info2 = run(logp, old, adv, weight, ref_logp=ref, beta=0.3)
    assert value == value2 and info == info2 and torch.equal(grad, grad2)
    assert (grad2[~mask] == 0).all() and (grad2[mask] != 0).any()


def test_broadcast_and_inputs_unchanged():
    """adv [N, 1] and [N, T] disagree, an in-place write, or a gradient into a constant."""
    mask, logp, old, adv, ref = random_step(5)
    inputs = [x.requires_grad_() for x in (logp, old, adv, ref)]
    copies, weight = [x.detach().clone() for x in inputs], grpo.token_weight(mask)
    narrow, _ = grpo.loss(logp, old, adv, weight, ref_logp=ref, beta=0.3)
    wide, _ = grpo.loss(logp, old, adv.expand(6, 5), weight, ref_logp=ref, beta=0.3)
    narrow.backward()
    assert narrow.item() == wide.item()
    assert [x.grad is None for x in inputs] == [False, True, True, True]
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Ratios in bf16 have steps of 1/128: a policy that moved by 0.3 % seems not to have."""
    mask, logp, old, adv, _ = random_step(2)
    weight, half = grpo.token_weight(mask), [x.to(dtype) for x in (logp, old, adv)]
    value, grad, info = run(*half, weight)
    value2, grad2, info2 = run(*(x.float() for x in half), weight)
    assert value == value2 and info == info2 and torch.equal(grad, grad2.to(dtype))


@CUDA
def test_gpu_agrees_with_cpu():
    """A tensor made on the wrong device, or float64 noise in a dead group."""
    mask, *args = random_step(4)
    weight = grpo.token_weight(mask.cuda())
    value, grad, info = run(
        *(x.cuda() for x in args[:3]), weight, ref_logp=args[3].cuda(), beta=0.3
    )
    value2, grad2, info2 = run(*args[:3], grpo.token_weight(mask), ref_logp=args[3], beta=0.3)
    assert value == pytest.approx(value2) and info == pytest.approx(info2)
    torch.testing.assert_close(grad.cpu(), grad2)
    assert (grpo.advantage(torch.full((4, 8), 1.7).cuda()) == 0).all()
