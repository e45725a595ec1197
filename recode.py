"""ReCode (arXiv 2506.20495): teach a language model to obey an API-update note, by reinforcement.

    python recode.py --algo grpo          trains the bundled policy on the bundled updates

Left out: models whose weights do not fit one GPU (several GPUs: `ranks.py`).

One step is five verbs, and the loop in `train` says just them:

    sample      G completions of each prompt                     Policy.sample
    score       format, and likeness to the true code            reward.score
    advantage   reward relative to its group                     grpo.advantage
    loss        clipped policy gradient                          grpo.loss, dapo.loss
    step        AdamW, more than once per rollout                recode.update

Shapes: B prompts (= groups), G samples per prompt, T completion length.
"""

import config as settings

if __name__ == "__main__":  # --help and a wrong flag are answered before torch is loaded
    CONFIG = settings.from_command_line()

import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import checkpoint
import dapo
import data
import evaluate
import grpo
import lora
import machine
import ranks
import report
import reward as rewards
from checkpoint import State
from config import Config
from policy import Policy, load
from rollout import Rollout, check_model, join, packs

# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(config: Config, policy: Policy, state: State) -> Iterator[dict]:
    """GRPO or DAPO, one step a turn. Yields the metrics of each step."""
    algo = {"grpo": grpo, "dapo": dapo}[config.algo]
    knobs = {name: getattr(config, name) for name in algo.KNOBS}
    reference = untrained(config, policy) if config.with_kl else None
    stream = endless(config, state.drawn)
    state.set_generators()
    while state.step < config.steps and state.idle < config.patience:
        log, batch = report.Log(), Batch(config)
        while batch.missing:  # once; DAPO: until the batch is full of live groups, or max_refills
            examples = list(itertools.islice(stream, batch.missing))
            # ---- sample
            rollout = draw(policy, examples, config, state)
            # ---- score
            texts = policy.texts(rollout)  # B*G
            scores = judge(algo, texts, rollout, examples, config)
            batch.add(rollout, scores)
            log.sampled(rollout, scores)
        rollout, reward = batch.close()
        # ---- advantage
        adv = algo.advantage(reward, scale=config.scale)[..., None]  # [B, G, 1]
        rollout = behaviour(policy, rollout, adv, config)
        # The weights span a whole optimizer step, so that its packs, on all ranks, simply add up.
        weight = torch.empty_like(rollout.logp)  # [B, G, T]
        for number, (groups, moving) in enumerate(shares(adv, config)):
            weight[groups] = algo.token_weight(rollout.mask[groups])
            still = ranks.share([b for b in groups if b not in moving])
            sums = Counter(ratio=weight[still].sum().item())  # theirs counts as 1
            for pack, own in passes(rollout, weight, moving, config):
                # ---- loss
                logp = policy.logp(rollout, pack, config.temperature)  # [b, G, T]
                sampled = number or policy.dtype == torch.float32  # see `behaviour`
                old_logp = rollout.logp[pack] if sampled else logp.detach()
                ref_logp = reference and reference.base_logp(rollout, pack, config.temperature)
                loss, info = algo.loss(logp, old_logp, adv[pack], own, ref_logp=ref_logp, **knobs)
                loss.backward()
                sums.update(loss=loss.item(), **info)
            # ---- step
            sums = ranks.add(sums)
            log.updated(sums, *update(policy, state, config, sums["loss"]))
        state.count(batch.drawn, live=int((adv != 0).any(dim=1).sum()))
        if config.show_every and state.step % config.show_every == 0:
            report.show(examples[0], texts[0], scores)
        yield log.close()


def finetune(config: Config, policy: Policy, state: State) -> Iterator[dict]:
    """The paper's baseline: cross-entropy on the true answers, the prompt masked."""
    stream = endless(config, state.drawn)
    state.set_generators()
    while state.step < config.steps:
        log, examples = report.Log(), list(itertools.islice(stream, config.prompts))
        answers = policy.imitate(examples, max_new_tokens=config.max_new_tokens)  # G = 1
        weight, sums = dapo.token_weight(answers.mask), Counter()  # [B, 1, T], token mean
        for pack, own in passes(answers, weight, list(range(len(examples))), config):
            logp = policy.logp(answers, pack)  # [b, 1, T]
            loss = -(own * logp).sum()  # NLL = -logp, so we negate
            loss.backward()
            sums.update(loss=loss.item())
        sums = ranks.add(sums)
        log.updated(sums, *update(policy, state, config, sums["loss"]))
        state.count(len(examples), live=len(examples))
        yield {"length": answers.length.float().mean().item(), **log.close()}


def update(policy: Policy, state: State, config: Config, loss: float) -> tuple[float, bool]:
    """One AdamW step at the scheduled rate -> the gradient's norm before it is cut, and whether
    the step was skipped, because norm or loss is not finite: the weights would be lost for good.
    """
    done = state.step / config.steps
    rate = min((state.step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    floor = config.lr_floor
    rate *= floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * rate
    weights = state.optimizer.param_groups[0]["params"]
    ranks.add_gradients(weights)
    norm = ranks.full(torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)).item()
    skip = not (math.isfinite(norm) and math.isfinite(loss))
    if skip:
        state.skipped += 1
    else:
        state.whole, state.skipped = False, 0
        state.optimizer.step()
    state.optimizer.zero_grad()
    return norm, skip


# ------------------------------------------------------------------------------------------------
# What the loop calls
# ------------------------------------------------------------------------------------------------


class Batch:
    """The groups of one step. What the algorithm does not keep goes; `missing` asks for more."""

    def __init__(self, config: Config):
        self.size, self.tries, self.drawn = config.prompts, 1 + config.max_refills, 0
        self.parts: list[Rollout] = []
        self.rewards: list[Tensor] = []

    @property
    def missing(self) -> int:
        """Prompts still to sample, 0 when the batch is full or no try is left."""
        return self.size - sum(map(len, self.rewards)) if self.tries else 0

    def add(self, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Take the groups of a rollout that are to be kept; of `scores` see `judge`."""
        groups = scores["keep"].nonzero()[:, 0].tolist()
        self.tries, self.drawn = self.tries - 1, self.drawn + len(rollout.prompts)
        self.parts.append(rollout.pick(groups))
        self.rewards.append(scores["total"][groups])

    def close(self) -> tuple[Rollout, Tensor]:
        """All kept groups as one rollout, and their rewards [B, G]."""
        return join(self.parts), torch.cat(self.rewards)


def endless(config: Config, drawn: int) -> Iterator[data.Example]:
    """The training split again and again, shuffled anew each time; goes on after `drawn` rows."""
    rows, rng = data.load(config.data, "train"), random.Random(config.seed)
    epochs = (rng.sample(rows, len(rows)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), drawn, None)


def draw(policy: Policy, examples: list[data.Example], config: Config, state: State) -> Rollout:
    """G completions of each example's prompt, as the config says; each rank samples its share."""
    mine = ranks.share(range(len(examples)))
    with ranks.whole(policy.model):
        rollout = policy.sample(
            policy.prompts(examples),
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=state.generator,
            # where the sampled log-probabilities are the old ones of the loss
            plain=policy.dtype == torch.float32 and not policy.adapted,
            only=mine or [0],  # without a share: along with the others, to draw as many numbers
        )
    groups = rollout.groups()[: len(mine)]
    return rollout if ranks.world() == 1 else join(ranks.gather(groups))


def judge(
    algo, texts: list[str], rollout: Rollout, examples: list[data.Example], config: Config
) -> dict[str, Tensor]:
    """reward.score of every completion, each [B, G]; `total` has the overlong penalty.

    And of every group, [B]: whether its scores are all equal (`dead`), whether to `keep` it.
    """
    B, G = rollout.length.shape
    targets = [e.new_code for e in examples for _ in range(G)]
    olds = [e.old_code for e in examples for _ in range(G)]
    scores = rewards.score(texts, targets, config.correctness, rollout.tokens.device, olds)
    scores = {name: value.view(B, G) for name, value in scores.items()}
    limit, buffer = config.max_new_tokens, config.overlong_buffer
    scores["total"] = scores["total"] + algo.overlong_penalty(rollout.length, limit, buffer)
    by = scores[config.live_by]
    return {**scores, "dead": grpo.dead(by), "keep": algo.keep(by)}


def untrained(config: Config, policy: Policy) -> Policy:
    """The reference of the KL: the same model with the adapters that it began with (mostly none),
    or a copy of the first one."""
    if policy.adapted:
        return policy
    reference = load(config.model, policy.model.device, config.dtype)
    reference.model.eval().requires_grad_(False)
    return reference


@torch.no_grad()
def behaviour(policy: Policy, rollout: Rollout, adv: Tensor, config: Config) -> Rollout:
    """The rollout with the log-probabilities of the policy that sampled it, as training sees them.

    In float32 sampling and training agree to 1e-5. In bf16 the shape of a batch moves a token's
    probability by some percent, which the ratio would take for a change of the policy: there they
    are computed anew, in the very passes that training will make. The first step's need no pass of
    their own: until then the policy is the one that sampled (`train` takes its new ones, detached).
    """
    if policy.dtype == torch.float32:
        return rollout
    logp = torch.zeros_like(rollout.logp)
    with ranks.whole(policy.model):
        for _, moving in shares(adv, config)[1:]:
            for pack in packs(rollout, config.pack_tokens, ranks.share(moving)):
                logp[pack] = policy.logp(rollout, pack, config.temperature)
    return replace(rollout, logp=logp)


def passes(
    rollout: Rollout, weight: Tensor, groups: list[int], config: Config
) -> Iterator[tuple[list[int], Tensor]]:
    """This rank's packs of these groups, each with the weight of its tokens [b, G, T].

    With --shard all ranks make each pass together: one with fewer packs goes along with a group of
    weight 0.
    """
    mine = packs(rollout, config.pack_tokens, ranks.share(groups))
    idle = max(ranks.gather([len(mine)])) - len(mine) if config.shard else 0
    yield from ((pack, weight[pack]) for pack in mine)
    yield from [(groups[:1], torch.zeros_like(weight[groups[:1]]))] * idle


def shares(adv: Tensor, config: Config) -> list[tuple[list[int], list[int]]]:
    """For each optimizer step its groups, and those of them that go through the model.

    Five groups and two updates give the groups 0, 1 and then 2, 3, 4. A dead group pushes nothing,
    so that it stays out unless the KL pulls at it (or all of its step are dead: zeros move AdamW).
    """
    count = len(adv)  # adv: [B, G, 1]
    parts = min(config.updates, count)
    steps = [list(range(i * count // parts, (i + 1) * count // parts)) for i in range(parts)]
    if config.with_kl:
        return [(groups, groups) for groups in steps]
    moves = (adv != 0).any(dim=1)[:, 0].tolist()  # a NaN moves: it must show
    return [(groups, [b for b in groups if moves[b]] or groups) for groups in steps]


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def start(config: Config) -> tuple[Policy, State]:
    """The policy and a fresh state, or those of the checkpoint that the run goes on from."""
    if config.shard and ranks.world() == 1:
        raise ValueError("--shard needs ranks to share among: start torchrun, or give --no-shard")
    device = ranks.begin(machine.chosen_device(config.device))
    with ranks.in_turn():
        kept = checkpoint.newest(Path(config.resume)) if config.resume else None
    policy = load(str(kept) if kept else config.model, device, config.dtype)
    # On the CPU, so that a run of one device can go on on another.
    generator = torch.Generator().manual_seed(config.seed)
    if not kept:
        adapt(config, policy, generator)
    if config.checkpointing:
        policy.checkpoint_activations()
    if config.shard:
        check_model(policy.model, length=1)  # once, and while its weights are whole
        policy.logp = ranks.shard(policy.model, policy.logp)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    state = State(optimizer, generator)
    state.data, state.model = data.fingerprint(config.data), checkpoint.fingerprint(config.model)
    if kept:
        checkpoint.restore(kept, policy, state)
    return policy, state


def adapt(config: Config, policy: Policy, generator: torch.Generator) -> None:
    """Put fresh adapters on the policy, if the config asks for some; keep those that it came with.

    ValueError if it came with others than the config asks for.
    """
    rank, dora = config.lora or config.dora, bool(config.dora)
    adapter = lora.Adapter(
        rank or 1, config.alpha, dora=dora, targets=lora.targets_of(config.targets)
    )
    if not policy.adapted:
        if rank:
            policy.adapt(adapter, generator)
        return
    if config.shard:
        raise ValueError(f"--model {config.model} has adapters: leave --shard away")
    if rank and not lora.same(policy.model, adapter):
        raise ValueError(
            f"--model {config.model} has {lora.summary(policy.model)}: leave --lora, --dora, "
            "--alpha and --targets away, or give them as they are there"
        )
    if config.with_kl:
        policy.began = lora.frozen(policy.model)


def run(config: Config) -> None:
    """Grade, train, grade again, and write the run folder."""
    begin, folder = time.time(), Path(config.out)
    with checkpoint.claimed(folder):
        if not (config.resume or ranks.rank() or checkpoint.is_empty(folder)):
            raise ValueError(
                f"{folder} is not empty: give another --out, or go on with --resume {folder}"
            )
        config = replace(config, threads=machine.use_threads(config.threads))
        torch.manual_seed(config.seed)
        policy, state = start(config)
        config = replace(config, dtype=str(policy.dtype).removeprefix("torch."))
        state.begin = begin
        ended = state.step >= config.steps or state.idle >= config.patience
        if report.is_graded(folder) and ended:
            more = "--patience" if state.idle >= config.patience else "--steps"
            print(f"{folder} is done, {state.step} steps; give a larger {more} to train on")
            return
        evaluate.check_rows(policy, config.data, config.max_new_tokens)
        metrics_file = report.Metrics(folder, config.tensorboard, state.step)
        # First what --resume asks for: a kill in between must not leave a folder that is neither.
        report.write(folder / "config.json", json.dumps(config.record(), indent=1) + "\n")
        report.rewind(folder, state.step)
        if state.step == 0:
            # A full disk shows now, and whatever ends the run leaves a checkpoint.
            checkpoint.save(folder, policy, state, config.keep)
            if not ranks.rank():
                checkpoint.check_room(folder, policy, config.keep)
        print(f"{config.algo} on {policy.model.device} (threads: {config.threads}) in {folder}")
        before = graded_base(config, policy, state, folder)
        loop(config, policy, state, folder, metrics_file)
        finish(config, policy, state, folder, before)


def graded_base(config: Config, policy: Policy, state: State, folder: Path) -> evaluate.Report:
    """The base policy's graded answers; a resumed run has them in its folder. {} of no rows."""
    rows, file = evaluate.chosen(config.data, config.eval_rows), folder / "before.jsonl"
    kept = evaluate.read(file, rows) if rows else {}
    if kept is not None:
        return kept
    base = policy if state.step == 0 else load(config.model, policy.model.device, config.dtype)
    with ranks.whole(base.model):
        before = evaluate.report(base, rows, config.max_new_tokens, "grading before")
    report.write(file, evaluate.lines(before))
    return before


def loop(
    config: Config, policy: Policy, state: State, folder: Path, metrics_file: report.Metrics
) -> None:
    """Run the steps under a progress bar, a line of metrics.jsonl each, and save whole steps."""
    verb = finetune if config.algo == "sft" else train
    with (
        report.progress(config.algo, config.steps, state.step) as bar,
        machine.patient() as signals,
    ):
        agreed = not config.shard  # a save of shards needs all ranks
        try:
            for metrics in verb(config, policy, state):
                metrics_file.append({"step": state.step} | metrics)
                bar.set_postfix_str(report.line(metrics), refresh=False)
                bar.update()
                for sentence in complaints(metrics, state, config):
                    tqdm.write(sentence)
                if state.skipped >= SKIPS:
                    raise ValueError(f"stopped at step {state.step}: {DIVERGED}")
                if ranks.agree(bool(signals)):
                    agreed = True
                    raise KeyboardInterrupt
                if state.step % config.save_every == 0 and state.step < config.steps:
                    checkpoint.save(folder, policy, state, config.keep)
            agreed = True
        finally:
            if agreed and state.whole and state.skipped < SKIPS:
                checkpoint.save(folder, policy, state, config.keep)


SKIPS = 4  # optimizer steps in a row that may be skipped
DIVERGED = (
    f"in {SKIPS} updates in a row loss or gradient was not finite, and none of them was made. "
    "Lower --lr in a new run (--resume keeps it); the newest checkpoint is from before"
)


def complaints(metrics: dict, state: State, config: Config) -> Iterator[str]:
    """What a person should know of this step, if anything."""
    if metrics.get("format") == -1:
        yield f"step {state.step}: no sample has the form asked for: start with --algo sft"
    if metrics["skipped"]:
        yield f"step {state.step}: {metrics['skipped']} updates skipped, their loss is not finite"
    if not state.live:
        yield f"step {state.step}: no live group, every sample of a prompt scored the same"
    elif config.algo == "dapo" and state.live < config.prompts:
        yield (
            f"step {state.step}: trained on {state.live} of {config.prompts} groups after "
            f"{config.max_refills} refills"
        )
    if state.idle >= config.patience:
        yield (
            f"stopped: in {state.idle} steps in a row every sample of a prompt scored the same. "
            "Try a larger --group-size, or data that is less easy or less hard (and DAPO "
            "--live reward)"
        )


def finish(
    config: Config, policy: Policy, state: State, folder: Path, before: evaluate.Report
) -> None:
    """Grade the trained policy; write its answers, samples.md and curves.png, last the grades."""
    rows, shown = evaluate.chosen(config.data, config.eval_rows), ""
    with ranks.whole(policy.model):
        after = evaluate.report(policy, rows, config.max_new_tokens, "grading after")
    if config.merge and not ranks.rank():
        policy.save_merged(folder / "merged")
    if rows:
        report.write(folder / "after.jsonl", evaluate.lines(after))
        page, shown = report.samples(f"{config.algo}, seed {config.seed}", before, after)
        report.write(folder / "samples.md", page)
    if not ranks.rank():
        report.curves(folder / "curves.png", report.history(folder))
    minutes, memory = state.elapsed() / 60, machine.peak_memory(policy.model.device)
    grades = {
        when: {split: evaluate.means(graded) for split, graded in splits.items()}
        for when, splits in {"before": before, "after": after}.items()
    }
    last = {"grade": grades, "minutes": minutes, "memory_gb": memory}
    report.Metrics(folder).append(last)
    total = f"{minutes:.1f} minutes, {memory:.1f} GB at most; everything is in {folder}"
    print(*filter(None, [shown, total]), sep="\n\n")


def main(config: Config | None = None) -> int:
    """The command. 0 done, 2 a sentence about what is wrong, 130 interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    for polite in machine.POLITE:  # all save, like Ctrl-C
        if signal.getsignal(polite) is not signal.SIG_IGN:
            signal.signal(polite, signal.default_int_handler)
    if ranks.rank():  # rank 0 alone speaks
        sys.stdout = open(os.devnull, "w")
    try:
        config = config or settings.parse()
        run(config)
        ranks.end()
    except (ValueError, OSError) as error:
        print(f"recode.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print(f"recode.py: {NO_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        if config and Path(config.out, "config.json").exists():
            print(f"Go on with: python recode.py --resume {config.out}", file=sys.stderr)
        return 130
    return 0


NO_MEMORY = (
    "out of memory: lower --prompts, --group-size, --max-new-tokens or --pack-tokens, or "
    "add --checkpointing"
)

if __name__ == "__main__":
    sys.exit(main(CONFIG))
