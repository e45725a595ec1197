"""DAPO, Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476), maximises

    J = 1/(sum_i |o_i|) sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)
    r_it = pi(o_it) / pi_old(o_it)            A_i = (R_i - mean(R)) / std(R) within the group

over N = B*G sampled completions o_i, from groups with 0 < #correct < G. What differs from GRPO:
(1) clip-higher, (2) dynamic sampling, (3) token mean, (4) overlong penalty; and no KL.
`grpo.py` and `dapo.py` have the same names in the same order: `diff grpo.py dapo.py` is the lesson.
Not here: sampling, log-probabilities, the optimizer, Config. Every function is pure.
Shapes: B prompts (= groups), G samples per prompt, N = B*G rows, T completion length.
"""

import torch
from torch import Tensor

from grpo import LOG_RATIO, advantage, clean, dead, kl, report

__all__ = ["KNOBS", "advantage", "keep", "kl", "loss", "overlong_penalty", "token_weight"]

# ---- the objective -------------------------------------------------------------------------------

KNOBS = ("clip_low", "clip_high", "dual_clip")  # the settings of a run that `loss` takes


def token_weight(mask: Tensor) -> Tensor:  # bool [N, T] or [B, G, T] -> float, the same shape
    """1 / sum_i |o_i| on each token: the mean over all tokens of the step (token mean, sec. 3.3).

    Call it once, on all N rows of an optimizer step, then slice: the mean of the parts' means is
    another number. A row with no token weighs 0.
    All tokens weigh the same, so a long answer weighs more than a short one.
    """
    count = mask.sum().clamp(min=1)  # [], sum_i |o_i|; an empty step is not 0 / 0
    return mask.float() / count  # [.., T]


def loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    weight: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
    ref_logp: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # [N, T] each, or broadcasting to it (adv [N, 1]) -> []
    """-sum(weight * min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)), floored at c A if A < 0.

    c = dual_clip > 1 + eps_high (arXiv 1912.09729): ReCode 10, verl 3, TRL none; None is off.
    Only `logp` gets a gradient. Where weight is 0 the inputs may hold anything, NaN included, and
    add exactly 0 to value and gradient. On-policy (logp == old_logp, no KL) the value is
    -sum(weight A), near 0; the gradient, -weight * A in logp, is not: watch reward, not loss.

    The dict holds sums of weight * x, so add them over the parts of a step (and divide by
    the step's weight.sum() if rows were empty): `clipfrac`, x = 1 where a bound took the gradient
    away, and its two parts, `clipfrac_low` with A < 0 and `clipfrac_high` with A > 0; `ratio`; and
    `kl`, k3 to the reference alone, 0.0 if there is no reference.
    """
    logp, old_logp, adv, ref_logp = clean(weight, logp, old_logp, adv, ref_logp)  # [N, T]
    ratio = (logp - old_logp).clamp(-LOG_RATIO, LOG_RATIO).exp()
    # min takes the pessimistic side, so the clip only stops a push that has already gone far:
    # A > 0, good token: above the upper bound no further push up; below the lower one all of it.
    # A < 0, bad token: below the lower bound no further push down; above the upper one all of it.
    # Clip-higher (sec. 3.1): a rare good token may gain 28 %, not 20, so exploration lives longer.
    unclipped = ratio * adv
    objective = torch.minimum(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)  # [N, T]
    if dual_clip is not None:
        # A < 0 and a huge r: r A has no bottom, one stale token would rule the step. c A bounds it.
        objective = torch.where(adv < 0, torch.maximum(objective, dual_clip * adv), objective)
    # J is maximised and optimizers minimise (as with NLL = -logp), so we negate.
    value = -(weight * objective).sum()  # []
    k3 = torch.zeros_like(ratio) if ref_logp is None else kl(logp, ref_logp)  # [N, T]
    cut = objective != unclipped
    sides = {"clipfrac_low": cut & (adv < 0), "clipfrac_high": cut & (adv > 0)}
    return value, report(weight, clipfrac=cut, **sides, ratio=ratio, kl=k3)


# ---- which groups are trained on, and what length costs ------------------------------------------


def keep(score: Tensor) -> Tensor:  # [B, G] -> bool [B]
    """Groups whose scores differ, max - min > 1e-6 (sec. 3.2). For the others sample new prompts.

    `score` is the exact-match indicator (the paper's 0 < #correct < G) or the reward: then those
    go whose A is 0, and groups that are all wrong in different ways stay. verl tests np.std > 0,
    and keeps three rewards of 0.7 (1e-16). A group with NaN stays: its loss is NaN, for all to see.
    """
    return ~dead(score)


def overlong_penalty(length: Tensor | int, max_length: int, buffer: int) -> Tensor:  # [N] -> [N]
    """R_length of sec. 3.4, added to the reward. Lengths in tokens; the paper's 20,480 and 4,096.

    0 up to max_length - buffer, then ((max_length - buffer) - length) / buffer, which is -1 at
    max_length, and -1 beyond. buffer = 0, no soft zone: 0 up to max_length, -1 beyond.
    """
    length = torch.as_tensor(length).float()  # exact up to 16.7 million tokens
    # max(buffer, 1): lengths are whole numbers, so without a soft zone one token too many costs 1.
    return ((max_length - buffer - length) / max(buffer, 1)).clamp(-1.0, 0.0)
