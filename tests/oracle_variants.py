"""Losses and gradients of the variants as TRL and verl compute them: test_variants.py keeps these.

    pip install torch==2.13.0 trl==1.16.0 ray tensordict hydra-core codetiming pandas
    pip install --no-deps verl==0.9.1                     it asks for an older transformers
    python tests/oracle_variants.py                       -> a line each: loss, gradient in logp

Their own functions run here: TRL's `GRPOTrainer._compute_loss` on a stand-in for the trainer, and
verl's registry of policy losses. The numbers below are the input, in float64.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import torch

PAD = 0.0
LOGP = [[-0.5, -1.0, -2.0], [-1.5, -0.2, PAD], [-0.7, PAD, PAD], [-3.0, -0.1, -1.2]]
OLD_LOGP = [[-0.9, -1.1, -1.4], [-1.2, -1.2, PAD], [-0.6, PAD, PAD], [-1.5, -0.3, -1.0]]
ADV = [1.0, 0.8, -0.6, -1.2]
LENGTH = [3, 2, 1, 3]
MAX_NEW_TOKENS = 5
CLIPS = {"drgrpo": (0.2, 0.2), "gspo": (0.1, 0.2), "cispo": (None, 0.5)}  # low, high


def inputs() -> tuple[torch.Tensor, ...]:
    """logp, old_logp [N, T], adv [N], mask [N, T]."""
    logp, old_logp, adv = (torch.tensor(x, dtype=torch.float64) for x in (LOGP, OLD_LOGP, ADV))
    return logp.requires_grad_(), old_logp, adv, torch.arange(3) < torch.tensor(LENGTH)[:, None]


def trl(name: str, logp, old_logp, adv, mask) -> torch.Tensor:
    """TRL: `loss_type`, for GSPO grpo's with `importance_sampling_level`; CISPO's bound is r's."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    low, high = CLIPS[name]
    trainer = mock.MagicMock(
        loss_type={"drgrpo": "dr_grpo", "gspo": "grpo", "cispo": "cispo"}[name],
        importance_sampling_level="sequence" if name == "gspo" else "token",
        epsilon_low=low, epsilon_high=1 + high if name == "cispo" else high, beta=0.0,
        max_completion_length=MAX_NEW_TOKENS, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, steps_per_generation=1), top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies.return_value = logp, torch.zeros_like(logp), None
    trainer.accelerator.num_processes = 1
    trainer.accelerator.reduce = lambda x, reduction: x
    trainer.accelerator.gather = lambda x: x
    ids = torch.ones_like(mask).long()
    batch = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
        "completion_mask": mask.long(), "advantages": adv, "old_per_token_logps": old_logp,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, batch)


def verl(name: str, logp, old_logp, adv, mask) -> torch.Tensor:
    """verl: `loss_mode` and `loss_agg_mode`; without a lower bound where clip_ratio_low is 10."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    low, high = CLIPS[name]
    loss, how, info = {
        "drgrpo": ("vanilla", "seq-mean-token-sum-norm", {"loss_scale_factor": MAX_NEW_TOKENS}),
        "gspo": ("gspo", "seq-mean-token-mean", {}),
        "cispo": ("cispo", "token-mean", {}),
    }[name]
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, clip_ratio_low=low or 10.0, clip_ratio_high=high,
        clip_ratio_c=1e9, use_dynamic_bsz=True, global_batch_info=info,
    )  # fmt: skip
    adv = adv[:, None].expand_as(logp)
    return get_policy_loss_fn(loss)(old_logp, logp, adv, mask.double(), how, config)[0]


if __name__ == "__main__":
    for name in CLIPS:
        for oracle in (trl, verl):
            logp, *rest = inputs()
            value = oracle(name, logp, *rest)
            (grad,) = torch.autograd.grad(value, logp)
            rows = [[round(x, 9) for x in row] for row in grad.tolist()]
            print(name, oracle.__name__, round(value.item(), 9), rows)
