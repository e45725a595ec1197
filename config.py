"""The settings of a run: `Config`, what its values must be, and the command line that fills it.

    python recode.py --algo dapo --steps 20    -> Config(algo="dapo", steps=20, ...)

It does not load torch, so that `--help` and a wrong flag are answered at once.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

RL = ("grpo", "dapo", "drgrpo", "gspo", "cispo")  # the algorithms that sample
ALGOS = (*RL, "sft")
# Lower and upper clip where none is given: as dapo.py and variants.py have them, from the papers.
CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (0.0, 4.0)}
DAPO = ("dapo",)


def flag(default, meaning: str, only: Iterable[str] = ALGOS, choices: str = ""):
    """A field of Config: the help of its flag, the algorithms that read it, its choices."""
    return field(default=default, metadata=dict(help=meaning, only=only, choices=choices.split()))


@dataclass
class Config:
    """Everything a run depends on. The defaults suit the bundled policy."""

    algo: str = flag("grpo", "algorithm", choices=" ".join(ALGOS))
    model: str = flag("", "folder, hub id, .gguf file, or what packages carry: smollm2, "
                      "qwen2.5-coder-0.5b, qwen2.5-coder-1.5b (default: bundled)")  # fmt: skip
    data: str = flag("", "JSON-lines files of API updates, with commas (default: bundled)")
    steps: int = flag(12, "rollouts to train on (sft: batches)")
    device: str = flag("auto", "auto takes the GPU where there is one", choices="auto cpu cuda")
    threads: int = flag(0, "CPU threads, 0 is as many as this process may use")
    seed: int = flag(0, "seed of the order of the data and of sampling")
    out: str = flag("", "run folder (default: runs/ALGO-seedN)")
    resume: str = flag("", "run folder to go on with, in its own configuration")
    # sample
    prompts: int = flag(16, "B, prompts per rollout (sft: answers per batch)")
    group_size: int = flag(8, "G, samples per prompt, 2 or more", RL)
    max_new_tokens: int = flag(384, "longest completion, tokens")
    temperature: float = flag(1.0, "of sampling and training alike, above 0", RL)
    filter: str = flag("exact", "a group teaches if this varies in it", DAPO, "exact reward")
    max_refills: int = flag(3, "times that dead groups are replaced a step, 0 is off", DAPO)
    patience: int = flag(10, "steps in a row without a group that teaches before the run stops", RL)
    # score
    correctness: str = flag("em_star", "reward of the code", RL, "es_star em_star em_copy")
    overlong_buffer: int = flag(0, "soft zone before --max-new-tokens, tokens, 0 is off", DAPO)
    # advantage and loss
    scale: bool = flag(True, "divide the advantage by the group's std", ("grpo", *CLIPS))
    clip: float = flag(0.2, "the ratio is clipped to 1 - clip ... 1 + clip", ("grpo", "drgrpo"))
    beta: float = flag(0.001, "weight of the KL to the untrained model, 0 is off", ("grpo",))
    clip_low: float = flag(0.0, "lower clip; 0 is dapo's 0.2, gspo's 3e-4", ("dapo", "gspo"))
    clip_high: float = flag(0.0, "upper clip; 0 is dapo's 0.28, gspo's 4e-4, cispo's 4", CLIPS)
    dual_clip: float = flag(10.0, "bound on the ratio of negative advantages, inf is off", DAPO)
    # step
    minibatches: int = flag(2, "optimizer steps per rollout", RL)
    pack_tokens: int = flag(2048, "tokens per forward pass: memory against speed")
    recompute: bool = flag(False, "make activations again in backward: memory against speed")
    lr: float = flag(4e-4, "peak learning rate (1e-6 is usual for all weights of a real model)")
    warmup: int = flag(2, "steps of linear warm-up, times a cosine down to --lr-floor")
    lr_floor: float = flag(0.1, "share of --lr at which the cosine ends, 1 is a constant rate")
    weight_decay: float = flag(0.0, "AdamW's, per step and learning rate")
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm")
    # weights
    dtype: str = flag(
        "auto", "of products and of frozen bases; auto: the faster", ALGOS, "auto float32 bfloat16"
    )
    adapter: str = flag("none", "train adapters, not all weights", choices="none lora dora")
    rank: int = flag(16, "of adapters")
    alpha: float = flag(32.0, "adapters are scaled by alpha / rank")
    targets: str = flag("", "layers with adapters, as q_proj,v_proj (default: all but the head)")
    shard: bool = flag(False, "share weights, gradients and optimizer among torchrun's ranks")
    # report
    save_every: int = flag(10, "steps between checkpoints, beside the one at the end")
    eval_rows: int = flag(300, "rows of each split in the tables, at most; 0 is no table")
    tensorboard: bool = flag(False, "write event files for TensorBoard beside metrics.jsonl")

    def __post_init__(self):
        low, high = CLIPS.get(self.algo, (0.0, 0.0))
        self.clip_low, self.clip_high = self.clip_low or low, self.clip_high or high
        check(self)
        self.out = self.out or f"runs/{self.algo}-seed{self.seed}"

    @property
    def filter_by(self) -> str:
        """The score whose spread lets a group teach: what DAPO's filter asks for, or the reward."""
        return "exact" if self.algo == "dapo" and self.filter == "exact" else "total"

    @property
    def with_kl(self) -> bool:
        """Whether the loss has a KL term, and needs a reference."""
        return self.algo == "grpo" and self.beta > 0

    def record(self) -> dict:
        """What config.json holds: the settings that this run reads, without --resume."""
        read = [f.name for f in fields(self) if self.algo in f.metadata["only"]]
        return {name: getattr(self, name) for name in read if name != "resume"}


# What numbers must satisfy (nan satisfies nothing), and the same in words.
LIMITS = [
    ("steps prompts max_new_tokens minibatches", lambda x: 1 <= x < 2**31, "1 or more"),
    ("pack_tokens patience save_every", lambda x: 1 <= x < 2**31, "1 or more"),
    ("max_refills warmup overlong_buffer clip_high", lambda x: 0 <= x < math.inf, "0 or more"),
    ("beta weight_decay eval_rows", lambda x: 0 <= x < math.inf, "0 or more"),
    ("lr", lambda x: 0 <= x <= 1e6, "0 or more, and at most 1e6"),
    ("threads", lambda x: 0 <= x <= 1024, "0 or more, and at most 1024"),
    ("rank", lambda x: 1 <= x <= 1024, "1 or more, and at most 1024"),
    ("max_grad_norm alpha", lambda x: 0 < x < math.inf, "more than 0"),
    ("lr_floor", lambda x: 0 <= x <= 1, "0 or more, and at most 1"),
    ("clip", lambda x: 0 < x < 1, "more than 0 and less than 1"),
    ("clip_low", lambda x: 0 <= x < 1, "0 or more, and less than 1"),
    ("temperature", lambda x: 0 < x < math.inf, "more than 0: greedy samples are all alike"),
    ("group_size", lambda x: 2 <= x < 2**31, "2 or more: an advantage compares samples"),
    ("seed", lambda x: 0 <= x < 2**63, "0 or more, and less than 2^63"),
]
ROLLOUT = 2**27  # most tokens in one rollout, at most 2 GB of records; more is a slip of the key
# What the paper states, and its scripts where it is silent, as far as it differs from the defaults.
# Its GRPO script takes one prompt a step and never stops early. Its DAPO script, unlike the paper,
# trains all weights: --adapter none --lr 1e-6 --warmup 10 --lr-floor 1. Its adapters' dropout of
# 0.01 is left out: the policy that is trained must be the one that sampled.
PAPER = {"adapter": "dora", "rank": 64, "alpha": 64.0, "targets": "q_proj,v_proj", "lr": 5e-5}
PAPER |= {"warmup": 150, "steps": 5000, "max_new_tokens": 1024, "correctness": "es_star"}
PRESETS = {
    "paper-grpo": PAPER | {"algo": "grpo", "prompts": 1, "minibatches": 1, "patience": 5000},
    "paper-dapo": PAPER | {"algo": "dapo", "prompts": 8, "weight_decay": 0.1},
}
# What --resume may change. Anything else would make one run of two.
RESUMABLE = set(
    "resume steps device threads dtype pack_tokens recompute shard patience save_every "
    "eval_rows tensorboard".split()
)


def check(config: Config) -> None:
    """ValueError with one sentence for whatever a run cannot have."""
    for f in fields(config):
        name, value, choices = spelled(f.name), getattr(config, f.name), f.metadata["choices"]
        # An int will do for a float, but True is no int.
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            raise ValueError(f"{name} is {value!r}: give a value of type {f.type.__name__}")
        if choices and value not in choices:
            raise ValueError(f"{name} is '{value}': choose from {', '.join(choices)}")
        if value != f.default:
            check_reader(f, config.algo)
    for names, fits, wish in LIMITS:
        for name in names.split():
            if not fits(getattr(config, name)):
                raise ValueError(f"{spelled(name)} is {getattr(config, name)}: give {wish}")
    if config.prompts * config.group_size * config.max_new_tokens > ROLLOUT:
        raise ValueError(
            f"--prompts x --group-size x --max-new-tokens is more than {ROLLOUT} tokens in one "
            "rollout: lower one of them"
        )
    if config.overlong_buffer > config.max_new_tokens:
        raise ValueError("--overlong-buffer must not exceed --max-new-tokens, its upper end")
    of_adapters = config.rank != 16 or config.alpha != 32 or config.targets
    if of_adapters and config.adapter == "none":
        raise ValueError("--rank, --alpha and --targets are of adapters: give --adapter lora too")
    if config.shard and config.adapter != "none":
        raise ValueError("--shard is for training all weights: leave it away with --adapter")
    if config.algo == "dapo" and not config.dual_clip > 1 + config.clip_high:
        raise ValueError("--dual-clip must exceed 1 + --clip-high, else it cuts every bad token")


def check_reader(f, algo: str) -> None:
    """Refuse a setting that this algorithm does not read: it would be recorded as if used."""
    only = f.metadata["only"]
    if algo not in only:
        raise ValueError(
            f"{spelled(f.name)} is a setting of {readers(only)}: leave it away with --algo {algo}"
        )


def readers(only: Iterable[str]) -> str:
    """The algorithms that read a setting, in the shorter way to say it."""
    others = [algo for algo in ALGOS if algo not in only]
    return min("all but " + " and ".join(others), " and ".join(only), key=len)


def spelled(name: str) -> str:
    """The flag of a field: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")


def from_command_line() -> Config:
    """`parse` for a script that has yet to load torch: until then Ctrl-C just ends it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return parse()
    except (ValueError, OSError) as error:
        print(f"recode.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(arguments: list[str] | None = None) -> Config:
    """Every field of Config is a flag. With --resume the run's own config.json gives the rest."""
    given, unknown = parser().parse_known_args(arguments)
    if unknown:
        refuse(unknown[0])
    given = vars(given)
    if "resume" in given:
        return resumed(given)
    if "preset" in given:
        given = with_preset(**given)
    for f in fields(Config):
        if f.name in given:
            check_reader(f, given.get("algo", Config.algo))
    return Config(**given)


# Flags of before, and what says the same now.
RENAMED = {
    "updates": "--minibatches",
    "checkpointing": "--recompute",
    "live": "--filter",
    "lora": "--adapter lora --rank",
    "dora": "--adapter dora --rank",
    "show_every": "nothing, samples.md shows completions",
    "keep": "nothing, the two newest checkpoints are kept",
    "merge": "lora.save_merged, of the policy that RUN/checkpoint holds",
}


def refuse(argument: str) -> None:
    """ValueError with what to say instead of an argument that is no flag of ours."""
    name = argument.lstrip("-").partition("=")[0]
    if name in RENAMED:
        raise ValueError(f"{argument} is no flag any more: use {RENAMED[name]}")
    if name in Config.__dataclass_fields__:  # with _
        raise ValueError(f"{argument} is spelled {spelled(name)}")
    raise ValueError(f"{argument} is no flag: see --help")


def with_preset(preset: str, **given) -> dict:
    """The preset's settings under the given ones."""
    settings = {**PRESETS[preset]}
    if given.get("algo", settings["algo"]) != settings["algo"]:
        raise ValueError(f"--preset {preset} chooses the algorithm: leave --algo away")
    for name in ("rank", "alpha", "targets") if given.get("adapter") == "none" else ():
        del settings[name]
    return settings | given


def parser() -> argparse.ArgumentParser:
    """A flag for each field of Config, with the algorithms that read it."""
    parser = argparse.ArgumentParser(
        description="Teach a language model to obey API-update notes (ReCode, arXiv 2506.20495).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    text = "the paper's settings, which any other flag overrides"
    for name, values in PRESETS.items():
        text += f"; {name}: " + " ".join(f"{spelled(k)} {v}" for k, v in sorted(values.items()))
    parser.add_argument("--preset", choices=PRESETS, help=text)
    for f in fields(Config):
        only, text = f.metadata["only"], f.metadata["help"]
        text = text if only == ALGOS else f"{readers(only).upper()}: {text}"
        text += "" if f.default == "" else f" (default: {f.default})"
        if f.type is bool:
            parser.add_argument(spelled(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = "|".join(f.metadata["choices"]) or f.type.__name__.upper()
            parser.add_argument(spelled(f.name), type=f.type, metavar=metavar, help=text)
    return parser


def resumed(given: dict) -> Config:
    """The configuration that a run folder holds, with what --resume may change."""
    if foreign := sorted(given.keys() - RESUMABLE):
        raise ValueError(f"--resume keeps the run's settings: leave {spelled(foreign[0])} away")
    file = Path(given["resume"], "config.json")
    if not file.is_file():
        raise ValueError(f"--resume {given['resume']}: no run to go on with in that folder")
    try:
        kept = modern(json.loads(file.read_text(encoding="utf-8")))
        config = Config(**kept | given | {"out": given["resume"]})
        check_dtype(kept, given)
        if not config.record().keys() <= kept.keys():
            raise TypeError
        return config
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{file} is not a configuration of this version: start anew") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_dtype(kept: dict, given: dict) -> None:
    """Say that a run goes on in another dtype; ValueError where its own weights would change."""
    before, now = kept.get("dtype"), given.get("dtype", kept.get("dtype"))
    adapted = Path(kept.get("model") or ".", "adapter_config.json").is_file()
    if before != now and kept.get("adapter", "none") == "none" and not adapted:
        raise ValueError(f"all weights are trained in {before}: --dtype may change under adapters")
    if before != now:
        print(f"this run went on in {before} so far, and from here on with --dtype {now}")


def modern(kept: dict) -> dict:
    """The settings of an older config.json in the names of today."""
    gone = ("merge", "keep", "lora", "dora", "show_every")
    kept = {**kept}  # TypeError if it is no object
    now = {RENAMED.get(k, k).removeprefix("--"): v for k, v in kept.items() if k not in gone}
    if "adapter" not in kept:
        kind = next((kind for kind in ("lora", "dora") if kept.get(kind)), "none")
        now |= {"adapter": kind, "rank": kept.get(kind, Config.rank)}
    return now
