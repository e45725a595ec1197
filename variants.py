"""Dr. GRPO, GSPO and CISPO: what each changes in GRPO, and nothing else. Read it after dapo.py.

    Dr. GRPO (arXiv 2503.20783) divides by neither the group's std nor the answer's length,
        J = 1/(N L) sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i)
        A_i = R_i - mean(R), L = max_new_tokens
    GSPO (arXiv 2507.18071) has one ratio an answer, the geometric mean of its tokens' ratios,
        J = 1/N sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
        s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|) = exp(1/|o_i| sum_t log r_it)
    CISPO (MiniMax-M1, arXiv 2506.13585) clips the weight of a token's gradient, never the gradient,
        J = 1/(sum_i |o_i|) sum_i sum_t sg(min(r_it, 1 + eps_high)) A_i log pi(o_it)

sg: a constant to the gradient. Letters and shapes are those of grpo.py, A_i too where none is here.
None has a KL: Dr. GRPO sets beta to 0, GSPO's paper omits it for brevity, CISPO has none. Not here:
what the papers do besides the loss (MiniMax-M1 also takes DAPO's dynamic sampling and its penalty).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import dapo
import grpo
from grpo import LOG_RATIO, clean, report

__all__ = ["Variant", "cispo_loss", "constant_weight", "gspo_loss", "of"]


@dataclass(frozen=True)
class Variant:
    """The names that the loop asks of `grpo`. What a variant does not give is GRPO's."""

    KNOBS: tuple[str, ...]  # the settings of a run that `loss` takes
    token_weight: Callable = grpo.token_weight
    loss: Callable = grpo.loss
    advantage: Callable = grpo.advantage
    keep: Callable = grpo.keep
    overlong_penalty: Callable = grpo.overlong_penalty


def of(max_new_tokens: int) -> dict[str, Variant]:
    """The three by name; Dr. GRPO's L is max_new_tokens."""
    return {
        "drgrpo": Variant(
            KNOBS=("clip",),
            token_weight=partial(constant_weight, max_new_tokens=max_new_tokens),
            advantage=lambda reward, scale: grpo.advantage(reward, scale=False),
        ),
        "gspo": Variant(KNOBS=("clip_low", "clip_high"), loss=gspo_loss),
        "cispo": Variant(KNOBS=("clip_high",), token_weight=dapo.token_weight, loss=cispo_loss),
    }


def constant_weight(mask: Tensor, max_new_tokens: int) -> Tensor:  # bool [N, T] -> float [N, T]
    """1 / (N L) on each token, however long its answer: a long wrong answer no longer costs less a
    token than a short one, so that wrong answers do not grow.

    The one weight whose sum over a step is not 1 but mean |o_i| / L: places that an answer left
    empty count, so on-policy the log's `ratio` is that share, and `clipfrac` is a share of N L.
    """
    return mask.float() / (mask[..., 0].numel() * max_new_tokens)  # [.., T]


def gspo_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    weight: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    ref_logp: None = None,
) -> tuple[Tensor, dict[str, float]]:  # [N, T] each, or broadcasting to it (adv [N, 1]) -> []
    """-sum(weight * min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)), a row's s on all its tokens.

    A row must be whole: its tokens are those where weight > 0. Each gets the same gradient in logp,
    -(row's weight) s A / |o_i|, or all get none. The clips are narrow, and the paper's (sec. 5.1):
    the mean of a long answer's log ratios hardly moves. The rest is as in `grpo.loss`.
    """
    new, old = clean(weight, logp, old_logp)  # [N, T]
    change = new - old  # [N, T], log r_it
    count = (weight > 0).sum(dim=-1, keepdim=True).clamp(min=1)  # [N, 1], |o_i|, no 0 / 0
    change = change.sum(dim=-1, keepdim=True) / count  # [N, 1], log s_i
    # From here on it is DAPO's clip, which has two widths, of a policy that moved by s_i.
    unmoved = torch.zeros_like(change)
    return dapo.loss(change, unmoved, adv, weight, clip_low, clip_high, dual_clip=None)


def cispo_loss(
    logp: Tensor, old_logp: Tensor, adv: Tensor, weight: Tensor, clip_high: float = 4.0,
    ref_logp: None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """-sum(weight * sg(min(r, 1 + eps_high)) * A * logp), REINFORCE with a bounded correction.

    Its gradient in logp, -weight * min(r, 1 + eps_high) * A, never ends: PPO's clip drops the rare
    tokens that change most ("However", "Recheck"), here they count on with a bounded weight. No
    lower bound, as the paper has it; the paper tunes the upper one and does not tell it: 1 + 4 is
    the eps_max = 5 of ScaleRL (arXiv 2510.13786). `clipfrac` in the log is the share of tokens
    with a bounded weight. Shapes and the rest are as in `grpo.loss`.
    """
    logp, old_logp, adv = clean(weight, logp, old_logp, adv)  # [N, T]
    ratio = (logp.detach() - old_logp).clamp(-LOG_RATIO, LOG_RATIO).exp()
    bounded = ratio.clamp(max=1 + clip_high)  # [N, T]
    value = -(weight * bounded * adv * logp).sum()  # []
    return value, report(weight, clipfrac=ratio > bounded, ratio=ratio)
