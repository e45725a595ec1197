"""GRPO, Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), maximises

    J = 1/N sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]
    r_it = pi(o_it) / pi_old(o_it)            A_i = (R_i - mean(R)) / std(R) within the group

over N = B*G sampled completions o_i. No critic: the other answers to a prompt are the baseline.
`grpo.py` and `dapo.py` have the same names in the same order: `diff grpo.py dapo.py` is the lesson.
Not here: sampling, log-probabilities, the optimizer, Config. Every function is pure.
Shapes: B prompts (= groups), G samples per prompt, N = B*G rows, T completion length.
"""

import torch
from torch import Tensor

__all__ = ["KNOBS", "advantage", "keep", "kl", "loss", "overlong_penalty", "token_weight"]

# ---- the objective -------------------------------------------------------------------------------

KNOBS = ("clip", "beta")  # the settings of a run that `loss` takes


def token_weight(mask: Tensor) -> Tensor:  # bool [N, T] or [B, G, T] -> float, the same shape
    """1 / (N |o_i|) on each token of row i: the mean over rows of each row's mean (sequence mean).

    Call it once, on all N rows of an optimizer step, then slice: the mean of the parts' means is
    another number. A row with no token weighs 0.
    It counts in N, as in TRL (not in verl). A token of a short answer outweighs one of a long one.
    """
    count = mask[..., 0].numel() * mask.sum(dim=-1, keepdim=True).clamp(min=1)  # [.., 1], N |o_i|
    return mask.float() / count  # [.., T]


def loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    weight: Tensor,
    clip: float = 0.2,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:  # [N, T] each, or broadcasting to it (adv [N, 1]) -> []
    """-sum(weight * min(r A, clip(r, 1 - eps, 1 + eps) A)) + beta * sum(weight * k3), eps = clip.

    Only `logp` gets a gradient. Where weight is 0 the inputs may hold anything, NaN included, and
    add exactly 0 to value and gradient. On-policy (logp == old_logp, no KL) the value is
    -sum(weight A), near 0; the gradient, -weight * A in logp, is not: watch reward, not loss.

    The dict holds sums of weight * x, so add them over the parts of a step (and divide by
    the step's weight.sum() if rows were empty): `clipfrac`, x = 1 where a bound took the gradient
    away, and its two parts, `clipfrac_low` with A < 0 and `clipfrac_high` with A > 0; `ratio`; and
    `kl`, k3 to the reference alone, 0.0 if there is no reference.
    """
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp, the reference model's log-probabilities")
    logp, old_logp, adv, ref_logp = clean(weight, logp, old_logp, adv, ref_logp)  # [N, T]
    ratio = (logp - old_logp).clamp(-LOG_RATIO, LOG_RATIO).exp()
    # min takes the pessimistic side, so the clip only stops a push that has already gone far:
    # A > 0, good token: above the upper bound no further push up; below the lower one all of it.
    # A < 0, bad token: below the lower bound no further push down; above the upper one all of it.
    unclipped = ratio * adv
    objective = torch.minimum(unclipped, ratio.clamp(1 - clip, 1 + clip) * adv)  # [N, T]
    # J is maximised and optimizers minimise (as with NLL = -logp), so we negate.
    value = -(weight * objective).sum()  # []
    k3 = torch.zeros_like(ratio) if ref_logp is None else kl(logp, ref_logp)  # [N, T]
    if beta:
        value = value + beta * (weight * k3).sum()
    cut = objective != unclipped
    sides = {"clipfrac_low": cut & (adv < 0), "clipfrac_high": cut & (adv > 0)}
    return value, report(weight, clipfrac=cut, **sides, ratio=ratio, kl=k3)


# ---- which groups are trained on, and what length costs ------------------------------------------


def keep(score: Tensor) -> Tensor:  # [B, G] -> bool [B]
    """All groups, those that cannot teach too: there every A is 0 and only the KL pulls."""
    return torch.ones_like(score[:, 0], dtype=torch.bool)


def overlong_penalty(length: Tensor | int, max_length: int, buffer: int) -> Tensor:  # [N] -> [N]
    """0: GRPO rewards a long answer like a short one."""
    return torch.zeros_like(torch.as_tensor(length).float())


# ---- advantage, KL and small parts: dapo.py imports them -----------------------------------------

EPS = 1e-4  # added to the std, as TRL does; verl adds 1e-6
DEAD = 1e-6  # a group whose rewards lie no further apart than this has nothing to teach
LOG_RATIO = 20.0  # |log ratio| is cut here, as verl does: e^20 = 4.9e8, float32 ends at e^88


def advantage(reward: Tensor, scale: bool = True) -> Tensor:  # [B, G] -> [B, G]
    """A_i = (R_i - mean(R)) / (std(R) + 1e-4) within each group; exactly 0 for a dead group.

    Sample std (over G - 1) as TRL and verl; GRPO-Zero and nano-aha divide by G: at G = 8 their A
    is 1.069 times ours. `scale=False` leaves the std out, as Dr. GRPO does (variants.py).
    A group of one is its own mean: A = 0. A NaN reward makes
    its group NaN: loud, on purpose. Dtype: the reward's, or float32 for integers.
    """
    centred = reward.double() - reward.double().mean(dim=1, keepdim=True)  # [B, G]
    # Why float64 and max - min: in float32 the mean of eight 1.7s is off by 1e-7 and so is the
    # std, and noise / noise is a real push: 0.106 with verl's 1e-6. Testing std > 0 misses it.
    variance = centred.square().sum(dim=1, keepdim=True) / max(reward.shape[1] - 1, 1)  # [B, 1]
    adv = centred / (variance.sqrt() + EPS) if scale else centred  # [B, G]
    adv = adv.masked_fill(dead(reward)[:, None], 0.0)
    return adv.to(reward.dtype if reward.is_floating_point() else torch.float32)


def dead(score: Tensor) -> Tensor:  # [B, G] -> bool [B]
    """Groups whose scores are all equal, max - min <= 1e-6. One with a NaN is not: it must show."""
    score = score.double()  # booleans and integers too
    return score.amax(dim=1) - score.amin(dim=1) <= DEAD


def kl(logp: Tensor, ref_logp: Tensor) -> Tensor:  # [N, T] -> [N, T]
    """k3 = exp(d) - d - 1, d = ref_logp - logp (Schulman, "Approximating KL divergence", 2020).

    An unbiased estimate of KL(pi || pi_ref) on samples of pi, never negative; its gradient in logp
    is 1 - exp(d). Not cut, as in TRL; verl cuts k3 at 10, so d > 2.6 gets no gradient there.
    """
    d = wide(ref_logp) - wide(logp)  # [N, T]
    return torch.expm1(d) - d  # expm1(d) = exp(d) - 1, but keeps the digits of a small d


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is: the 8 bits of bf16 are too few for exp and minus."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clean(weight: Tensor, logp: Tensor, *fixed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each one wide, and 0 where weight is, for 0 * inf is NaN; only `logp` keeps its gradient."""
    fixed = [x if x is None else x.detach() for x in fixed]
    return tuple(x if x is None else torch.where(weight > 0, wide(x), 0.0) for x in (logp, *fixed))


def report(weight: Tensor, **values: Tensor) -> dict[str, float]:
    """Each value as the detached float sum(weight * value)."""
    return {name: (weight * x.detach()).sum().item() for name, x in values.items()}
