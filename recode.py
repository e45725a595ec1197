"""ReCode (arXiv 2506.20495): teach a language model to obey an API-update note, by reinforcement.

    python recode.py --algo grpo          trains the bundled policy on the bundled updates

Left out:
    1. a critic and a reward model: a group's answers are each other's baseline, rules the judge
    2. models whose weights do not fit one device (several may share the work: `upkeep/ranks.py`)
    3. sampling by another program, answers that use tools or take several turns

A turn of the loop in `train` is five verbs, and says just them:

    sample      G completions of each prompt                     rollout.sample
    score       format, and likeness to the true code            reward.score
    advantage   reward relative to its group                     grpo.advantage
    loss        clipped policy gradient                          grpo.loss, dapo.loss, variants
    step        AdamW, once a minibatch

`upkeep/` has the rest of a run: folders, checkpoints, curves. Shapes: B prompts (= groups), G
samples per prompt, T completion length; b groups of one part.
"""

import config as settings

if __name__ == "__main__":  # --help and a wrong flag are answered before torch is loaded
    CONFIG = settings.from_command_line()

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dapo
import data
import grpo
import reward as rewards
import variants
from config import Config
from policy import Policy, untrained
from rollout import Rollout, join
from upkeep import ranks, run
from upkeep.checkpoint import State
from upkeep.metrics import Log


def train(config: Config, policy: Policy, state: State) -> Iterator[dict]:
    """GRPO, DAPO or a variant: samples a turn, some steps on them. Yields the turn's metrics."""
    algo = {"grpo": grpo, "dapo": dapo, **variants.of(config.max_new_tokens)}[config.algo]
    knobs = {name: getattr(config, name) for name in algo.KNOBS}
    base_logp = untrained(policy, config.model).base_logp if config.with_kl else lambda *_: None
    stream = data.endless(config.data, config.seed, state.drawn)
    state.set_generators()
    while state.step < config.steps and state.idle < config.patience:
        log, batch = Log(), Batch(config)
        while batch.missing:  # once; DAPO: until enough groups are kept, or no try is left
            examples = list(itertools.islice(stream, batch.missing))
            # ---- sample
            rollout = sample(policy, examples, config, state)
            # ---- score
            texts = policy.texts(rollout)  # B*G
            scores = score(algo, texts, rollout, examples, config)
            batch.add(rollout, scores)
            log.sampled(rollout, scores)
        rollout, reward = batch.close()
        # ---- advantage
        adv = algo.advantage(reward, scale=config.scale)[..., None]  # [B, G, 1]
        for parts, resting in minibatches(policy, rollout, adv, algo, config):
            log.add(ratio=resting)  # dead groups, which stay out of the model: their ratio is 1
            for part in parts:
                # ---- loss
                logp = policy.logp(rollout, part.groups, config.temperature)  # [b, G, T]
                old_logp = logp.detach() if part.old_logp is None else part.old_logp
                ref_logp = base_logp(rollout, part.groups, config.temperature)  # None without KL
                loss, info = algo.loss(
                    logp, old_logp, part.adv, part.weight, ref_logp=ref_logp, **knobs
                )
                loss.backward()
                log.add(loss=loss.item(), **info)
            # ---- step
            norm, skipped = step(state, config, loss=log.loss())
            log.step(norm, skipped)
        state.count(batch.drawn, teaching=int((adv != 0).any(dim=1).sum()))
        yield log.close()


def finetune(config: Config, policy: Policy, state: State) -> Iterator[dict]:
    """The paper's baseline: cross-entropy on the true answers, the prompt masked."""
    stream = data.endless(config.data, config.seed, state.drawn)
    state.set_generators()
    while state.step < config.steps:
        log, examples = Log(), list(itertools.islice(stream, config.prompts))
        answers = policy.imitate(examples, max_new_tokens=config.max_new_tokens)  # G = 1
        weight = dapo.token_weight(answers.mask)  # [B, 1, T], token mean
        for groups, own in ranks.passes(policy.model, answers, weight, config.pack_tokens):
            logp = policy.logp(answers, groups)  # [b, 1, T]
            loss = -(own * logp).sum()  # NLL = -logp, so we negate
            loss.backward()
            log.add(loss=loss.item())
        norm, skipped = step(state, config, loss=log.loss())
        log.step(norm, skipped)
        state.count(len(examples), teaching=len(examples))
        yield {"length": answers.length.float().mean().item(), **log.close()}


def step(state: State, config: Config, loss: float) -> tuple[float, bool]:
    """One AdamW step at the scheduled rate -> the gradient's norm before it is cut, and whether it
    was skipped: norm or loss are not finite, and the model would be lost for good."""
    rate = min((state.step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    cosine = (1 + math.cos(math.pi * (state.step / config.steps))) / 2
    rate *= config.lr_floor + (1 - config.lr_floor) * cosine
    state.optimizer.param_groups[0]["lr"] = config.lr * rate
    parameters = state.optimizer.param_groups[0]["params"]
    ranks.add_gradients(parameters)
    norm = ranks.full(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)).item()
    skip = not (math.isfinite(norm) and math.isfinite(loss))
    if skip:
        state.skipped += 1
    else:
        state.complete, state.skipped = False, 0
        state.optimizer.step()
    state.optimizer.zero_grad()
    return norm, skip


# ------------------------------------------------------------------------------------------------
# What the loop calls
# ------------------------------------------------------------------------------------------------


class Batch:
    """The groups of one turn. What the algorithm does not keep goes; `missing` asks for more."""

    def __init__(self, config: Config):
        self.size, self.tries, self.drawn = config.prompts, 1 + config.max_refills, 0
        self.rollouts, self.rewards = [], []  # of each try, the rewards [B', G]

    @property
    def missing(self) -> int:
        """Prompts still to sample, 0 when the batch is full or no try is left."""
        return self.size - sum(map(len, self.rewards)) if self.tries else 0

    def add(self, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Take the groups of a rollout that are to be kept; of `scores` see `score`."""
        groups = scores["keep"].nonzero()[:, 0].tolist()
        self.tries, self.drawn = self.tries - 1, self.drawn + len(rollout.prompts)
        self.rollouts.append(rollout.pick(groups))
        self.rewards.append(scores["total"][groups])

    def close(self) -> tuple[Rollout, Tensor]:
        """All kept groups as one rollout, and their rewards [B, G]."""
        return join(self.rollouts), torch.cat(self.rewards)


@dataclass
class Part:
    """Some groups of a minibatch, as many as one forward pass may hold."""

    groups: list[int]  # which of the rollout's B
    weight: Tensor  # [b, G, T]; of each token, in the whole minibatch
    adv: Tensor  # [b, G, 1]
    old_logp: Tensor | None  # [b, G, T]; None: what `logp` is now, for no step was made yet


def sample(policy: Policy, examples: list[data.Example], config: Config, state: State) -> Rollout:
    """G completions of each example's prompt, as the config says."""
    how = {n: getattr(config, n) for n in ("group_size", "max_new_tokens", "temperature")}
    # Plain where all weights train in float32: to the last digit it is the old_logp of the loss.
    how["plain"] = policy.dtype == torch.float32 and not policy.adapted
    return ranks.sample(policy, policy.prompts(examples), generator=state.generator, **how)


def score(
    algo, texts: list[str], rollout: Rollout, examples: list[data.Example], config: Config
) -> dict[str, Tensor]:
    """reward.score of every completion, each [B, G]; `total` has the overlong penalty.

    And of every group, [B]: whether its scores are all equal (`dead`), whether to `keep` it: by
    the score that --filter names.
    """
    B, G = rollout.length.shape
    targets = [e.new_code for e in examples for _ in range(G)]
    olds = [e.old_code for e in examples for _ in range(G)]
    scores = rewards.score(texts, targets, config.correctness, rollout.tokens.device, olds)
    scores = {name: value.view(B, G) for name, value in scores.items()}
    limit, buffer = config.max_new_tokens, config.overlong_buffer
    scores["total"] = scores["total"] + algo.overlong_penalty(rollout.length, limit, buffer)
    by = scores[config.filter_by]
    return {**scores, "dead": grpo.dead(by), "keep": algo.keep(by)}


@torch.no_grad()
def minibatches(
    policy: Policy, rollout: Rollout, adv: Tensor, algo, config: Config
) -> list[tuple[list[Part], float]]:
    """For each optimizer step its parts, and the weight of the dead groups, outside the model.

    Weights are those of a whole minibatch, so that its parts, on all ranks, simply add up. In bf16
    the shape of a batch moves a token's probability by some percent, which the ratio would take for
    a change of the policy: there old log-probabilities come from the passes that training makes.
    """
    steps = []
    for groups, teach in portions(adv, config):
        weight = torch.zeros_like(rollout.logp)  # [B, G, T]
        weight[groups] = algo.token_weight(rollout.mask[groups])
        parts = []
        for some, own in ranks.passes(policy.model, rollout, weight, config.pack_tokens, teach):
            old_logp = rollout.logp[some]
            if policy.dtype != torch.float32:  # the first step's policy is the one that sampled
                old_logp = policy.logp(rollout, some, config.temperature) if steps else None
            parts.append(Part(some, own, adv[some], old_logp))
        resting = ranks.share([b for b in groups if b not in teach])
        steps.append((parts, weight[resting].sum().item()))
    return steps


def portions(adv: Tensor, config: Config) -> list[tuple[list[int], list[int]]]:
    """For each optimizer step its groups, and those of them that go through the model.

    Five groups and two minibatches give the groups 0, 1 and then 2, 3, 4. A dead group pushes
    nothing, so that it stays out unless the KL pulls at it. (If all of a step are dead they run: a
    gradient of zeros lets AdamW's momentum act, as in any step.)
    """
    count = len(adv)  # adv: [B, G, 1]
    steps = min(config.minibatches, count)
    steps = [list(range(i * count // steps, (i + 1) * count // steps)) for i in range(steps)]
    if config.with_kl:
        return [(groups, groups) for groups in steps]
    teaches = (adv != 0).any(dim=1)[:, 0].tolist()  # a NaN teaches: it must show
    return [(groups, [b for b in groups if teaches[b]] or groups) for groups in steps]


LOOPS = dict.fromkeys(settings.RL, train) | {"sft": finetune}

if __name__ == "__main__":
    sys.exit(run.main(CONFIG, LOOPS))
