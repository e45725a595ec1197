"""ReCode (arXiv 2506.20495): teach a language model to obey an API-update note, by reinforcement.

    python recode.py --algo grpo          trains the bundled policy on the bundled updates

Left out: (1) evaluation by running the code, (2) adapters and low precision: all weights train in
float32, (3) several GPUs, (4) bit-exact resume.

One step is five verbs, and the loop in `train` says just them:

    sample      G completions of each prompt                     Policy.sample
    score       format, and likeness to the true code            reward.score
    advantage   reward relative to its group                     grpo.advantage
    loss        clipped policy gradient                          grpo.loss, dapo.loss
    step        AdamW, more than once per rollout                recode.update

Shapes: B prompts (= groups), G samples per prompt, T completion length.
"""

import argparse
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import dapo
import data
import evaluate
import grpo
import report
import reward as rewards
from policy import Policy, State, load, restore, save
from rollout import Rollout, join, token_logp


def flag(default, meaning: str, choices: tuple = ()):
    """A field of Config and the help of its command-line flag."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass
class Config:
    """Everything a run depends on. The defaults suit the bundled policy."""

    algo: str = flag("grpo", "algorithm", ("grpo", "dapo", "sft"))
    model: str = flag("", "folder or hub id of a causal language model (default: bundled)")
    data: str = flag("", "JSON-lines file of API updates (default: bundled)")
    steps: int = flag(12, "rollouts to train on (sft: batches)")
    device: str = flag("auto", "auto takes the GPU where there is one", ("auto", "cpu", "cuda"))
    seed: int = flag(0, "seed of the order of the data and of sampling")
    out: str = flag("", "run folder (default: runs/ALGO-seedN)")
    resume: str = flag("", "run folder to go on with, in its own configuration")
    # sample
    prompts: int = flag(16, "B, prompts per rollout")
    group_size: int = flag(8, "G, samples per prompt, 2 or more")
    max_new_tokens: int = flag(384, "longest completion, tokens")
    temperature: float = flag(1.0, "of sampling and scoring alike, above 0")
    live: str = flag("exact", "DAPO: a group is live if this varies in it", ("exact", "reward"))
    max_refills: int = flag(3, "DAPO: times that dead groups are replaced per step, 0 is off")
    patience: int = flag(10, "DAPO: steps in a row without a live group before the run stops")
    # score
    correctness: str = flag("em_star", "reward of the code", ("es_star", "em_star"))
    overlong_buffer: int = flag(0, "DAPO: soft zone before max_new_tokens, tokens, 0 is off")
    # advantage and loss
    scale: bool = flag(True, "divide the advantage by the group's std (Dr. GRPO does not)")
    clip: float = flag(0.2, "GRPO: the ratio is clipped to 1 - clip ... 1 + clip")
    beta: float = flag(0.001, "GRPO: weight of the KL to the untrained model, 0 drops it")
    clip_low: float = flag(0.2, "DAPO: lower clip")
    clip_high: float = flag(0.28, "DAPO: upper clip")
    dual_clip: float = flag(
        10.0, "DAPO: bound on the ratio where the advantage is negative, inf is off"
    )
    # step
    updates: int = flag(2, "optimizer steps per rollout")
    micro_groups: int = flag(2, "groups per forward pass: memory against speed")
    lr: float = flag(4e-4, "peak learning rate (1e-6 is usual for all weights of a real model)")
    warmup: int = flag(2, "steps of linear warm-up, times a cosine down to a tenth")
    weight_decay: float = flag(0.0, "AdamW's, per step and learning rate")
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm")
    # report
    save_every: int = flag(10, "steps between checkpoints, beside the one at the end")
    eval_rows: int = flag(300, "rows of each split in the final table, at most")
    show_every: int = flag(0, "steps between two completions that are shown, 0 is off")

    def __post_init__(self):
        check(self)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.out = self.out or f"runs/{self.algo}-seed{self.seed}"

    @property
    def live_by(self) -> str:
        """The score whose spread makes a group live: what DAPO's filter asks for, or the reward."""
        return "exact" if self.algo == "dapo" and self.live == "exact" else "total"


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(config: Config, policy: Policy, state: State) -> Iterator[dict]:
    """GRPO or DAPO, one step a turn. Yields the metrics of each step."""
    algo = {"grpo": grpo, "dapo": dapo}[config.algo]
    knobs = {name: getattr(config, name) for name in algo.KNOBS}
    reference = frozen(config) if knobs.get("beta") else None
    stream = endless(config, state.drawn)
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
        for groups in shares(len(adv), config.updates):
            part, part_adv = rollout.pick(groups), adv[groups]
            # The weights span the whole optimizer step, so its micro-batches simply add up.
            weight = algo.token_weight(part.mask)  # [b, G, T]
            for micro in split(len(groups), config.micro_groups):
                # ---- loss
                logp = token_logp(policy.model, part, micro, temperature=config.temperature)
                ref_logp = reference_logp(reference, part, micro, config)
                loss, info = algo.loss(
                    logp, part.logp[micro], part_adv[micro], weight[micro],
                    ref_logp=ref_logp, **knobs,
                )  # fmt: skip
                loss.backward()
                log.add(loss=loss.item(), **info)
            # ---- step
            log.updated(grad_norm=update(policy, state, config))
        state.count(batch.drawn, live=len(adv))
        if config.show_every and state.step % config.show_every == 0:
            report.show(examples[0], texts[0], scores)
        yield log.close()


def finetune(config: Config, policy: Policy, state: State) -> Iterator[dict]:
    """The paper's baseline: cross-entropy on the true answers, the prompt masked."""
    stream = endless(config, state.drawn)
    while state.step < config.steps:
        log, examples = report.Log(), list(itertools.islice(stream, config.prompts))
        answers = policy.imitate(examples, max_new_tokens=config.max_new_tokens)  # G = 1
        weight = dapo.token_weight(answers.mask)  # [B, 1, T], token mean
        for micro in split(len(examples), config.micro_groups * config.group_size):
            logp = token_logp(policy.model, answers, micro)  # [b, 1, T]
            loss = -(weight[micro] * logp).sum()  # NLL = -logp, so we negate
            loss.backward()
            log.add(loss=loss.item())
        log.updated(grad_norm=update(policy, state, config))
        state.count(len(examples), live=len(examples))
        yield {"length": answers.length.float().mean().item(), **log.close()}


def update(policy: Policy, state: State, config: Config) -> float:
    """One AdamW step at the scheduled rate -> the gradient's norm before it is cut."""
    done = state.step / config.steps
    rate = min((state.step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    rate *= 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * rate
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    if torch.isfinite(norm):  # a broken gradient would break the weights for good
        state.optimizer.step()
    state.optimizer.zero_grad()
    return norm.item()


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
    """G completions of each example's prompt, as the config says."""
    return policy.sample(
        examples,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        generator=state.generator,
    )


def judge(
    algo, texts: list[str], rollout: Rollout, examples: list[data.Example], config: Config
) -> dict[str, Tensor]:
    """reward.score of every completion, each [B, G]; `total` has the overlong penalty.

    And of every group, [B]: whether its scores are all equal (`dead`), whether to `keep` it.
    """
    B, G = rollout.length.shape
    targets = [e.new_code for e in examples for _ in range(G)]
    scores = rewards.score(texts, targets, config.correctness, config.device)
    scores = {name: value.view(B, G) for name, value in scores.items()}
    limit, buffer = config.max_new_tokens, config.overlong_buffer
    scores["total"] = scores["total"] + algo.overlong_penalty(rollout.length, limit, buffer)
    by = scores[config.live_by]
    return {**scores, "dead": grpo.dead(by), "keep": algo.keep(by)}


def frozen(config: Config) -> PreTrainedModel:
    """The untrained model, the reference of the KL."""
    return load(config.model, config.device).model.eval().requires_grad_(False)


@torch.no_grad()
def reference_logp(
    reference: PreTrainedModel | None, rollout: Rollout, groups: list[int], config: Config
) -> Tensor | None:
    """Log-probabilities under the reference model, [b, G, T]; None where there is none."""
    if reference is None:
        return None
    return token_logp(reference, rollout, groups, temperature=config.temperature)


def split(count: int, size: int) -> list[list[int]]:
    """The numbers below 5 in twos -> [[0, 1], [2, 3], [4]]"""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def shares(count: int, parts: int) -> list[list[int]]:
    """The numbers below 5 for two -> [[0, 1], [2, 3, 4]]; no list is empty."""
    parts = min(parts, count)
    return [list(range(i * count // parts, (i + 1) * count // parts)) for i in range(parts)]


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def start(config: Config) -> tuple[Policy, State]:
    """The policy and a fresh state, or those of the checkpoint that the run goes on from."""
    folder = Path(config.resume)
    policy = load(str(folder / "checkpoint") if config.resume else config.model, config.device)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    # On the CPU, so that a run of one device can go on on another.
    state = State(optimizer, torch.Generator().manual_seed(config.seed))
    return policy, restore(folder, state) if config.resume else state


def check_lengths(policy: Policy, config: Config) -> None:
    """Every prompt must fit the model's context before anything is sampled."""
    room = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    parts = dict.fromkeys(["train", *data.splits(config.data)])  # "train" must be there
    for example in (e for part in parts for e in data.load(config.data, part)):
        length = len(data.prompt(example, policy.tokenizer))
        if length + config.max_new_tokens > room:
            raise ValueError(
                f"prompt {example.id!r} has {length} tokens, with --max-new-tokens "
                f"{config.max_new_tokens} more than the model's context of {room}: "
                "lower that, or drop the row"
            )


def loop(config: Config, policy: Policy, state: State, folder: Path) -> None:
    """Run the steps under a progress bar, a line of metrics.jsonl each, and save."""
    verb = finetune if config.algo == "sft" else train
    bar = tqdm(total=config.steps, initial=state.step, desc=config.algo, dynamic_ncols=True)
    try:
        with bar:
            for metrics in verb(config, policy, state):
                report.append(folder, {"step": state.step} | metrics)
                bar.set_postfix(report.line(metrics), refresh=False)
                bar.update()
                for sentence in complaints(state, config):
                    tqdm.write(sentence)
                if state.step % config.save_every == 0 and state.step < config.steps:
                    save(folder, policy, state)
    finally:
        save(folder, policy, state)


def complaints(state: State, config: Config) -> Iterator[str]:
    """What to say of a step with too few live groups, and of the last of too many such steps."""
    if state.live < config.prompts:
        did = f"trained on {state.live} of {config.prompts} groups"
        did = did if state.live else "no live group, no update"
        yield f"step {state.step}: {did} after {config.max_refills} refills"
    if state.idle >= config.patience:
        yield (
            f"stopped: in {state.idle} steps in a row every sample of a prompt scored the same. "
            "Try --live reward, a larger --group-size, or data that is less easy or less hard"
        )


def run(config: Config) -> None:
    """Grade, train, grade again, and write the run folder."""
    begin, folder = time.time(), Path(config.out)
    if not config.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: give another --out, or go on with --resume {folder}"
        )
    torch.manual_seed(config.seed)
    policy, state = start(config)
    check_lengths(policy, config)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{config.algo} on {config.device}, run folder {folder}")
    graded = config.data, config.eval_rows, config.max_new_tokens
    before = evaluate.report(load(config.model, config.device), *graded, "grading before")
    if (folder / "metrics.jsonl").exists():  # a resumed run's
        report.rewind(folder, state.step)
    (folder / "config.json").write_text(
        json.dumps(asdict(config) | {"resume": ""}, indent=1) + "\n"
    )
    loop(config, policy, state, folder)
    after = evaluate.report(policy, *graded, "grading after")
    minutes, memory = (time.time() - begin) / 60, report.peak_memory(config.device)
    reports = {"before": before, "after": after}
    grades = {
        when: {split: evaluate.means(graded) for split, graded in splits.items()}
        for when, splits in reports.items()
    }
    report.append(folder, {"grade": grades, "minutes": minutes, "memory_gb": memory})
    publish(config, folder, before, after)
    print(f"\n{minutes:.1f} minutes, {memory:.1f} GB at most; everything is in {folder}")


def publish(config: Config, folder: Path, before: evaluate.Report, after: evaluate.Report) -> None:
    """Write samples.md and curves.png; print an example and the table."""
    page = report.sample_page(*(list(splits.values())[-1] for splits in (before, after)))
    table = report.table(before, after)
    parts = [f"# {config.algo}, seed {config.seed}", table, report.kinds(before, after), page]
    (folder / "samples.md").write_text("\n\n".join(parts))
    report.curves(folder / "curves.png", report.history(folder))
    print(page.partition("\n## ")[0] + "\n" + table)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


# What numbers must satisfy (nan satisfies nothing), and the same in words.
LIMITS = [
    (
        "steps prompts max_new_tokens updates micro_groups patience save_every eval_rows",
        lambda x: x >= 1,
        "1 or more",
    ),
    (
        "max_refills warmup overlong_buffer lr beta weight_decay",
        lambda x: 0 <= x < math.inf,
        "0 or more",
    ),
    ("clip_high max_grad_norm", lambda x: 0 < x < math.inf, "more than 0"),
    ("clip clip_low", lambda x: 0 < x < 1, "more than 0 and less than 1"),
    ("temperature", lambda x: 0 < x < math.inf, "more than 0: greedy samples are all alike"),
    ("group_size", lambda x: x >= 2, "2 or more: an advantage compares samples"),
]
# What --resume may change. Anything else would make one run of two.
RESUMABLE = {"resume", "steps", "device", "micro_groups", "patience", "save_every", "eval_rows"}


def check(config: Config) -> None:
    """ValueError with one sentence for whatever a run cannot have."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{spelled(f.name)} is '{value}': choose from {', '.join(choices)}")
    for names, fits, wish in LIMITS:
        for name in names.split():
            if not fits(getattr(config, name)):
                raise ValueError(f"{spelled(name)} is {getattr(config, name)}: give {wish}")
    if config.overlong_buffer > config.max_new_tokens:
        raise ValueError("--overlong-buffer must not exceed --max-new-tokens, its upper end")
    if not config.dual_clip > 1 + config.clip_high:
        raise ValueError("--dual-clip must exceed 1 + --clip-high, else it cuts every bad token")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU on this machine; use --device cpu")


def spelled(name: str) -> str:
    """The flag of a field: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")


def parse(arguments: list[str] | None = None) -> Config:
    """Every field of Config is a flag. With --resume the run's own config.json gives the rest."""
    parser = argparse.ArgumentParser(
        description="Teach a language model to obey API-update notes (ReCode, arXiv 2506.20495).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in fields(Config):
        names = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name])
        text = f"{f.metadata['help']} (default: {f.default})".replace(" (default: )", "")
        if f.type is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = "|".join(f.metadata["choices"]) or f.type.__name__.upper()
            parser.add_argument(*names, type=f.type, metavar=metavar, help=text)
    given = vars(parser.parse_args(arguments))
    if "resume" not in given:
        return Config(**given)
    file = Path(given["resume"], "config.json")
    if foreign := sorted(given.keys() - RESUMABLE):
        raise ValueError(
            f"--resume goes on in its own folder and configuration: leave --{foreign[0]} away"
        )
    if not (file.is_file() and (file.parent / "checkpoint" / "state.pt").is_file()):
        raise ValueError(f"--resume {given['resume']}: no checkpoint to go on from in that folder")
    try:
        return Config(**json.loads(file.read_text()) | given | {"out": given["resume"]})
    except TypeError:
        raise ValueError(
            f"{file} is not a configuration of this version: start a new run"
        ) from None


def main() -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for polite in (signal.SIGTERM, signal.SIGHUP):  # these save, like Ctrl-C
        signal.signal(polite, signal.default_int_handler)
    config = None
    try:
        config = parse()
        run(config)
    except (ValueError, OSError) as error:
        print(f"recode.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        if config and Path(config.out, "checkpoint").exists():
            print(f"Go on with: python recode.py --resume {config.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
