"""ReCode (arXiv 2506.20495): teach a language model to obey an API-update note, by reinforcement.

    python recode.py --algo grpo          trains the bundled policy on the bundled updates

Left out: (1) evaluation by running the code, (2) adapters and low precision: all weights train in
float32, (3) several GPUs, (4) bit-exact resume.

One step is five verbs, and the loop in `train` says just them:

    sample      G completions of each prompt                     rollout.sample
    score       format, and likeness to the true code            reward.score
    advantage   reward relative to its group                     grpo.advantage
    loss        clipped policy gradient                          grpo.loss, dapo.loss
    step        AdamW, more than once per rollout                recode.step

Shapes: B prompts (= groups), G samples per prompt, T completion length.
"""

import argparse
import itertools
import json
import math
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import dapo
import data
import grpo
import reward
from rollout import Rollout, join, sample, token_logp


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

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--{f.name} is '{value}': choose from {', '.join(choices)}")
        for names, fits, wish in LIMITS:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise ValueError(f"--{name} is {getattr(self, name)}: give {wish}")
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError("--overlong_buffer must not exceed --max_new_tokens, its upper end")
        if not self.dual_clip > 1 + self.clip_high:
            raise ValueError("--dual_clip must exceed 1 + clip_high, else it cuts every bad token")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU on this machine; use --device cpu")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.out = self.out or f"runs/{self.algo}-seed{self.seed}"


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
# What each loss takes from Config. A reference model is needed where beta is not 0.
KNOBS = {"grpo": ("clip", "beta"), "dapo": ("clip_low", "clip_high", "dual_clip")}


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(config: Config, policy: "Policy", state: "State") -> Iterator[dict]:
    """GRPO or DAPO, one step a turn. Yields the metrics of each step."""
    algo = {"grpo": grpo, "dapo": dapo}[config.algo]
    knobs = {name: getattr(config, name) for name in KNOBS[config.algo]}
    reference = frozen(config) if knobs.get("beta") else None
    examples = endless(config, state.drawn)
    while state.step < config.steps:
        log, batch = Log(), Batch(config, dynamic=hasattr(algo, "keep"))
        while batch.missing:  # once; DAPO: until the batch is full of live groups, or max_refills
            asked = list(itertools.islice(examples, batch.missing))
            # ---- sample
            rollout = complete(policy, asked, config, state.generator)
            # ---- score
            batch.add(rollout, judge(policy, rollout, asked, config))
        rollout, reward = batch.close()
        # ---- advantage
        adv = algo.advantage(reward, scale=config.scale)[..., None]  # [B, G, 1]
        for groups in shares(range(len(adv)), config.updates):
            # The weights span the whole optimizer step, so its micro-batches simply add up.
            weight = algo.token_weight(rollout.mask[groups].flatten(0, 1))  # [b * G, T]
            weight = weight.view_as(rollout.mask[groups])  # [b, G, T]
            for at in split(range(len(groups)), config.micro_groups):
                # ---- loss
                micro = [groups[i] for i in at]
                logp = token_logp(policy.model, rollout, micro, temperature=config.temperature)
                if reference:
                    knobs["ref_logp"] = reference_logp(reference, rollout, micro, config)
                loss, info = algo.loss(logp, rollout.logp[micro], adv[micro], weight[at], **knobs)
                loss.backward()
                log.add(loss=loss.item(), **info)
            # ---- step
            log.step(grad_norm=step(policy, state, config))
        state.count(batch.drawn)
        yield log.close(batch)
        if stuck(state, len(adv), config):
            return


def finetune(config: Config, policy: "Policy", state: "State") -> Iterator[dict]:
    """The paper's baseline: cross-entropy on the true answers, the prompt masked."""
    examples = endless(config, state.drawn)
    while state.step < config.steps:
        log, asked = Log(), list(itertools.islice(examples, config.prompts))
        rollout = imitate(policy, asked, config)  # one completion per prompt: the true one
        weight = dapo.token_weight(rollout.mask.flatten(0, 1))[:, None]  # [B, 1, T], token mean
        for micro in split(range(len(asked)), config.micro_groups * config.group_size):
            logp = token_logp(policy.model, rollout, micro)  # [b, 1, T]
            loss = -(weight[micro] * logp).sum()  # NLL = -logp, so we negate
            loss.backward()
            log.add(loss=loss.item())
        log.step(grad_norm=step(policy, state, config))
        state.count(len(asked))
        yield {"length": rollout.length.float().mean().item(), **log.close()}


def step(policy: "Policy", state: "State", config: Config) -> float:
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


@dataclass
class Policy:
    """A model, its tokenizer, the ids that end its answers and the one that pads them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]
    pad_id: int


@dataclass
class State:
    """What changes while training, beside the weights."""

    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # draws the samples
    step: int = 0
    drawn: int = 0  # examples taken from the endless, shuffled training data
    idle: int = 0  # steps in a row without a live group

    def count(self, drawn: int) -> None:
        """A step is done. One that Ctrl-C cuts short is not counted, and its prompts come again."""
        self.step, self.drawn = self.step + 1, self.drawn + drawn


class Batch:
    """The groups of one step. `dynamic` (DAPO): dead ones go and `missing` asks for others."""

    def __init__(self, config: Config, dynamic: bool):
        self.config, self.dynamic = config, dynamic
        self.tries = 1 + (config.max_refills if dynamic else 0)
        self.parts: list[Rollout] = []
        self.score: list[dict[str, Tensor]] = []  # of every group, also of those that went
        self.rewards: list[Tensor] = []

    @property
    def missing(self) -> int:
        """Prompts still to sample, 0 when the batch is full or no try is left."""
        return self.config.prompts - sum(map(len, self.rewards)) if self.tries else 0

    def add(self, rollout: Rollout, score: dict[str, Tensor]) -> None:
        """Take the groups of a rollout, score values [B, G], or only its live ones."""
        by = score["exact" if self.dynamic and self.config.live == "exact" else "total"]
        live = dapo.keep(by)  # [B]
        groups = live.nonzero()[:, 0].tolist() if self.dynamic else list(range(len(live)))
        self.tries -= 1
        self.parts.append(rollout.pick(groups))
        self.rewards.append(score["total"][groups])
        self.score.append(
            {**score, "dead": ~live, "length": rollout.length, "cut": rollout.truncated}
        )

    def close(self) -> tuple[Rollout, Tensor]:
        """All kept groups as one rollout, and their rewards [B, G]."""
        return join(self.parts), torch.cat(self.rewards)

    @property
    def drawn(self) -> int:
        return sum(len(s["length"]) for s in self.score)

    @property
    def tokens(self) -> int:
        return sum(int(s["length"].sum()) for s in self.score)

    def means(self) -> dict[str, float]:
        """Means over every sampled group, kept or not: the kept ones alone would flatter."""
        names = {"total": "reward", "exact": "exact", "format": "format", "dead": "dead"}
        names |= {"length": "length", "cut": "truncated"}
        return {
            name: torch.cat([s[key].float().flatten() for s in self.score]).mean().item()
            for key, name in names.items()
        }


class Log:
    """The numbers of one step: sums over micro-batches, means over optimizer steps."""

    def __init__(self):
        self.begin, self.updates, self.sums = time.time(), 0, {}

    def add(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number

    def step(self, grad_norm: float) -> None:
        self.add(grad_norm=grad_norm)
        self.updates += 1

    def close(self, batch: Batch | None = None) -> dict[str, float]:
        """Reward first, loss last: on its own the loss says little (see grpo.loss)."""
        means = {name: number / max(self.updates, 1) for name, number in self.sums.items()}
        seconds = time.time() - self.begin
        sampled = batch.means() if batch else {}
        if batch:
            sampled["tokens_per_s"] = batch.tokens / seconds
        return {**sampled, "seconds": seconds, **means, "loss": means.get("loss", 0.0)}


def endless(config: Config, drawn: int) -> Iterator[data.Example]:
    """The training split again and again, shuffled anew each time; goes on after `drawn` rows."""
    rows, rng = data.load(config.data, "train"), random.Random(config.seed)
    epochs = (rng.sample(rows, len(rows)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), drawn, None)


def complete(
    policy: Policy, examples: list[data.Example], config: Config, generator=None, **how
) -> Rollout:
    """Sample completions of the examples' prompts, as the config says unless `how` overrides it."""
    how = {"group_size": config.group_size, "temperature": config.temperature} | how
    return sample(
        policy.model,
        [data.prompt(e, policy.tokenizer) for e in examples],
        max_new_tokens=config.max_new_tokens,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        generator=generator,
        **how,
    )


def texts(policy: Policy, rollout: Rollout) -> list[str]:
    """The N completions as text, without the token that ended them."""
    pairs = zip(rollout.tokens.flatten(0, 1), rollout.length.flatten(), strict=True)
    rows = [row[:length].tolist() for row, length in pairs]
    found = [row[:-1] if row[-1] in policy.eos_ids else row for row in rows]
    return policy.tokenizer.batch_decode(found, clean_up_tokenization_spaces=False)


def judge(
    policy: Policy, rollout: Rollout, examples: list[data.Example], config: Config
) -> dict[str, Tensor]:
    """reward.score of every completion, each value [B, G]; `total` has the overlong penalty."""
    B, G = rollout.length.shape
    targets = [e.new_code for e in examples for _ in range(G)]
    found = reward.score(texts(policy, rollout), targets, config.correctness, config.device)
    found = {name: value.view(B, G) for name, value in found.items()}
    if config.algo == "dapo" and config.overlong_buffer:
        limit, buffer = config.max_new_tokens, config.overlong_buffer
        found["total"] = found["total"] + dapo.overlong_penalty(rollout.length, limit, buffer)
    return found


def imitate(policy: Policy, examples: list[data.Example], config: Config) -> Rollout:
    """The true answers, as if the policy had sampled them once per prompt."""
    prompts = [data.prompt(e, policy.tokenizer) for e in examples]
    answers = [data.completion(e) for e in examples]
    answers = policy.tokenizer(answers, add_special_tokens=False)["input_ids"]
    answers = [(ids + policy.eos_ids[:1])[: config.max_new_tokens] for ids in answers]
    length = torch.tensor([[len(ids)] for ids in answers], device=config.device)  # [B, 1]
    T = int(length.max())
    padded = [ids + [policy.pad_id] * (T - len(ids)) for ids in answers]
    tokens = torch.tensor(padded, device=config.device)[:, None]  # [B, 1, T]
    mask = torch.arange(T, device=config.device) < length[..., None]
    return Rollout(prompts, tokens, mask, torch.zeros_like(mask).float(), length, length < 0)


def stuck(state: State, live: int, config: Config) -> bool:
    """Say so when a step had too few live groups; True when the run has nothing more to learn."""
    state.idle = 0 if live else state.idle + 1
    if live < config.prompts:
        did = (
            f"trained on {live} of {config.prompts} groups" if live else "no live group, no update"
        )
        tqdm.write(f"step {state.step}: {did} after {config.max_refills} refills")
    if state.idle == config.patience:
        tqdm.write(
            f"stopped: in {state.idle} steps in a row every sample of a prompt scored the same. "
            "Try --live reward, a larger --group-size, or data that is less easy or less hard"
        )
    return state.idle >= config.patience


@torch.no_grad()
def reference_logp(model, rollout: Rollout, groups: list[int], config: Config) -> Tensor:
    return token_logp(model, rollout, groups, temperature=config.temperature)


def split(items, size: int) -> list[list]:
    """[0, 1, 2, 3, 4] in twos -> [[0, 1], [2, 3], [4]]"""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def shares(items, count: int) -> list[list]:
    """[0, 1, 2, 3, 4] for two -> [[0, 1], [2, 3, 4]]; no list is empty."""
    n, count = len(items), min(count, len(items))
    return [list(items[i * n // count : (i + 1) * n // count]) for i in range(count)]


# ------------------------------------------------------------------------------------------------
# Before and after
# ------------------------------------------------------------------------------------------------


def grade(completions: list[str], examples: list[data.Example], device: str) -> dict[str, float]:
    """Means over the rows: EM* and ES* in [-2, 2], format and exact match in percent."""
    targets = [e.new_code for e in examples]
    found = reward.score(completions, targets, "es_star", device)
    return {
        "em_star": reward.em_star(completions, targets).mean().item(),
        "es_star": found["correctness"].mean().item(),
        "format": 50 * (found["format"].mean().item() + 1),
        "exact": 100 * found["exact"].mean().item(),
    }


def greedy(policy: Policy, examples: list[data.Example], config: Config) -> list[str]:
    """The greedy completion of every example, in order; like lengths are sampled together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].old_code))
    found = {}
    for part in split(order, 64):
        rows = [examples[i] for i in part]
        rollout = complete(policy, rows, config, group_size=1, temperature=0.0)
        found |= zip(part, texts(policy, rollout), strict=True)
    return [found[i] for i in range(len(examples))]


def copied(example: data.Example) -> str:
    """The answer that ignores the note: what every result must be read against."""
    return data.answer("", example.old_code)


def report(policy: Policy, config: Config) -> dict:
    """Grades and greedy completions on a fixed choice of rows of each split."""
    found = {}
    for part in data.splits(config.data):
        rows = data.load(config.data, part)
        # No run's seed: with that the rows here would be those that the run trains on first.
        rows = random.Random("report").sample(rows, min(config.eval_rows, len(rows)))
        said = greedy(policy, rows, config)
        found[part] = {"rows": rows, "said": said, "grade": grade(said, rows, config.device)}
    return found


def table(before: dict, after: dict) -> str:
    """Markdown: copying, the base and the trained policy, on training and held-out libraries."""
    names = {"train": "training split", "test_seen": "new updates", "test": "held-out libraries"}
    lines = [
        "| updates | rows | policy | EM* | ES* | format | exact |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in after:
        name, rows = names[part], after[part]["rows"]
        grades = {
            "copy the old code": grade([copied(e) for e in rows], rows, "cpu"),
            "base": before[part]["grade"],
            "trained": after[part]["grade"],
        }
        for who, g in grades.items():
            lines.append(
                f"| {name} | {len(rows)} | {who} | {g['em_star']:.2f} | {g['es_star']:.2f} "
                f"| {g['format']:.1f} % | {g['exact']:.1f} % |"
            )
    return "\n".join(lines)


def kinds(before: dict, after: dict) -> str:
    """Markdown: which kinds of update come out right, over the rows that training never saw."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    for part in (p for p in after if p != "train"):
        rows = after[part]["rows"]
        hits = [
            reward.em_star(when[part]["said"], [e.new_code for e in rows]) == 2
            for when in (before, after)
        ]
        for example, *hit in zip(rows, *hits, strict=True):
            found.setdefault(example.kind or "unnamed", []).append(tuple(map(bool, hit)))
    lines = ["| kind of update | rows | base | trained |", "|---|---|---|---|"]
    for kind, hits in sorted(found.items(), key=lambda item: -len(item[1])):
        old, new = (f"{100 * sum(column) / len(hits):.0f} %" for column in zip(*hits, strict=True))
        lines.append(f"| {kind} | {len(hits)} | {old} | {new} |")
    return "\n".join(lines) if found else ""


def sample_page(before: dict, after: dict, count: int = 4) -> str:
    """Held-out completions before and after: the first ones, then failures after training."""
    rows, old, new = after["rows"], before["said"], after["said"]
    missed = (reward.em_star(new, [e.new_code for e in rows]) < 2).nonzero()[:, 0].tolist()
    chosen = dict.fromkeys([*range(min(count, len(rows))), *missed[:count]])
    return "\n".join(example_page(rows[i], old[i], new[i]) for i in chosen)


def example_page(example: data.Example, old: str, new: str) -> str:
    """One example of samples.md: the note, the code, and what the policy said before and after."""
    right = grade([new], [example], "cpu")["exact"] == 100
    blocks = [
        f"## {example.id or example.dependency}: {'right' if right else 'WRONG'} after training"
    ]
    blocks += [example.update_info, "Old code:", fence(example.old_code)]
    blocks += ["Before:", fence("<think>" + old), "After:", fence("<think>" + new)]
    return "\n\n".join([*blocks, "True code:", fence(example.new_code)]) + "\n"


def fence(text: str) -> str:
    return f"~~~~\n{text.strip(chr(10))}\n~~~~"


def curves(path: Path, history: list[dict]) -> None:
    """One panel per metric over the steps, reward first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in PANELS if any(m.get(n) for m in history)]  # not what was never measured
    figure, axes = pyplot.subplots(
        2, math.ceil(len(names) / 2) or 1, figsize=(11, 5), squeeze=False
    )
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        axis.plot(
            [m["step"] for m in history], [m.get(name, math.nan) for m in history], linewidth=1.2
        )
        axis.set_title(PANELS[name], fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


PANELS = {
    "reward": "reward (mean, -3 to 3)",
    "exact": "exact match (share)",
    "dead": "dead groups (share)",
    "length": "length (tokens)",
    "clipfrac": "clipped tokens (share)",
    "kl": "KL to the base (nats a token)",
    "grad_norm": "gradient norm",
    "loss": "loss",
}


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


def load_policy(name: str, device: str) -> Policy:
    """A causal language model in float32, its tokenizer, and every id that may end an answer."""
    name = name or str(data.POLICY)
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise ValueError(f"--model {name}: no such folder; data.make_policy makes the bundled one")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model {name}: {str(error).splitlines()[0]}") from None
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    eos_ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, *ends]) if i is not None]
    if not eos_ids:
        raise ValueError(f"--model {name}: neither tokenizer nor model names an end token")
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Policy(model, tokenizer, eos_ids, pad_id)


def frozen(config: Config) -> PreTrainedModel:
    """The untrained model, the reference of the KL."""
    return load_policy(config.model, config.device).model.eval().requires_grad_(False)


def save(folder: Path, policy: Policy, state: State) -> None:
    """Write folder/checkpoint. The last one stays until the new one is whole."""
    fresh, final, old = (folder / f"checkpoint{end}" for end in (".new", "", ".old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    policy.model.save_pretrained(fresh)
    policy.tokenizer.save_pretrained(fresh)
    counts = {"step": state.step, "drawn": state.drawn}  # a resumed run has its patience anew
    kept = {"optimizer": state.optimizer.state_dict(), "generator": state.generator.get_state()}
    torch.save(counts | kept, fresh / "state.pt")
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def start(config: Config) -> tuple[Policy, State]:
    """The policy and a fresh state, or those of the checkpoint that the run goes on from."""
    kept = Path(config.resume, "checkpoint")
    policy = load_policy(str(kept) if config.resume else config.model, config.device)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    # On the CPU, so that a run of one device can go on on another.
    state = State(optimizer, torch.Generator().manual_seed(config.seed))
    if config.resume:
        try:
            saved = torch.load(kept / "state.pt", map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError):
            raise ValueError(f"{kept / 'state.pt'} is damaged: start a new run") from None
        state.optimizer.load_state_dict(saved.pop("optimizer"))
        state.generator.set_state(saved.pop("generator"))
        state = replace(state, **saved)
    return policy, state


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> Config:
    """Every field of Config is a flag. With --resume the run's own config.json gives the rest."""
    parser = argparse.ArgumentParser(
        description="Teach a language model to obey API-update notes (ReCode, arXiv 2506.20495).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in fields(Config):
        names = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name])
        what = f"{f.metadata['help']} (default: {f.default})".replace(" (default: )", "")
        if f.type is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, help=what)
        else:
            metavar = "|".join(f.metadata["choices"]) or f.type.__name__.upper()
            parser.add_argument(*names, type=f.type, metavar=metavar, help=what)
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


def line(metrics: dict) -> dict[str, str]:
    """What the progress bar shows: reward first, loss last."""
    shown = {
        "reward": "+.2f", "exact": ".0%", "dead": ".0%", "length": ".0f", "clipfrac": ".1%",
        "grad_norm": ".2f", "tokens_per_s": ".0f", "loss": "+.3f",
    }  # fmt: skip
    return {name: format(metrics[name], how) for name, how in shown.items() if name in metrics}


def loop(config: Config, policy: Policy, state: State, folder: Path) -> None:
    """Run the steps under a progress bar, a line of metrics.jsonl each, and save."""
    verb = finetune if config.algo == "sft" else train
    bar = tqdm(total=config.steps, initial=state.step, desc=config.algo, dynamic_ncols=True)
    try:
        with open(folder / "metrics.jsonl", "a") as file, bar:
            for metrics in verb(config, policy, state):
                file.write(json.dumps({"step": state.step} | metrics) + "\n")
                file.flush()
                bar.set_postfix(line(metrics), refresh=False)
                bar.update()
                if state.step % config.save_every == 0 and state.step < config.steps:
                    save(folder, policy, state)
    finally:
        save(folder, policy, state)


def history(folder: Path) -> list[dict]:
    rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "grade" not in row]


def rewind(file: Path, step: int) -> None:
    """Drop the metrics of steps after the checkpoint, and a line half written: made again."""
    lines = [text for text in file.read_text().splitlines(keepends=True) if text.endswith("\n")]
    file.write_text("".join(text for text in lines if json.loads(text).get("step", 0) <= step))


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
    print(f"{config.algo} on {config.device}, run folder {folder}; grading the base policy ...")
    before = report(load_policy(config.model, config.device), config)
    if (folder / "metrics.jsonl").exists():  # a resumed run's
        rewind(folder / "metrics.jsonl", state.step)
    kept = asdict(config) | {"resume": ""}
    (folder / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
    loop(config, policy, state, folder)
    after = report(policy, config)
    grades = {"before": before, "after": after}
    minutes, memory = (time.time() - begin) / 60, peak_memory(config)
    with open(folder / "metrics.jsonl", "a") as file:
        grades = {w: {p: r[p]["grade"] for p in r} for w, r in grades.items()}
        file.write(json.dumps({"grade": grades, "minutes": minutes, "memory_gb": memory}) + "\n")
    shown, page = (
        table(before, after),
        sample_page(*(list(r.values())[-1] for r in (before, after))),
    )
    parts = [f"# {config.algo}, seed {config.seed}", shown, kinds(before, after), page]
    (folder / "samples.md").write_text("\n\n".join(parts))
    curves(folder / "curves.png", history(folder))
    print(page.partition("\n## ")[0] + "\n" + shown)
    print(f"\n{minutes:.1f} minutes, {memory:.1f} GB at most; everything is in {folder}")


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


def peak_memory(config: Config) -> float:
    """Most memory this process ever held, in GB (10^9 bytes): of the GPU where there is one."""
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
