"""LoRA and DoRA by hand: train a small correction of each linear layer, the layer itself frozen.

    LoRA (arXiv 2106.09685)    y = W x + b + s B A x           A [r, in], B [out, r], s = alpha / r
    DoRA (arXiv 2402.09353)    y = m/n (W x + s B A x) + b     n = |W + s B A| by row, m [out]

A starts random and B at zero, m at n: at first nothing changes. n counts as a constant in backward
(paper, section 4.3), so it needs no graph and, by the binomial formula, not the matrix B A either:

    n^2 = |W|^2 + 2 <W, s B A> + |s B A|^2 = |W|^2 + <s B, 2 W A^T + s B (A A^T)>      by row

with |W|^2 kept: a product as dear as r tokens, where B A and its sum would pass over [out, in].

Precision: W and b keep their dtype. A, B and m are float32, for a bf16 weight does not move under
small steps (1.0 - 5e-5 == 1.0). x meets A and B in the dtype of x, as under autocast, which works
too. n and m/n - 1 are computed in float32: in bf16, m/n would lose a growth of m by 0.3 %.

One model plays three parts: it trains with adapters attached, is its own reference inside
`disabled` (or `swapped`, where it began with trained ones), and decodes fast inside `merged`.
Files are PEFT's, both ways. Not here: adapters of embeddings, convolutions or quantized layers,
several adapters at once, trained biases, dropout: the policy that trains is the one that sampled.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapter:
    """What is attached to each target."""

    rank: int = 16  # r; small ones do for reinforcement learning
    # "LoRA without regret" (Thinking Machines, 2025): with 32 the best learning rate hardly depends
    # on the rank. The ReCode paper has rank 64, alpha 64.
    alpha: float = 32
    dora: bool = False
    rslora: bool = False  # s = alpha / sqrt(r) (arXiv 2312.03732)
    targets: tuple[str, ...] = ()  # last parts of module names; (): every linear layer but the head
    file: bytes = field(default=b"", repr=False)  # adapter_config.json as loaded, to write back

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError("give a rank of 1 or more and an alpha above 0")

    @property
    def scale(self) -> float:  # s
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# ---- one layer -----------------------------------------------------------------------------------

TINY = 1e-24  # least n^2: a row of zeros would give m/n = 0/0


class Adapted(nn.Linear):
    """A linear layer with its adapter; `weight` and `bias` are the base's own, and named so."""

    def __init__(self, base: nn.Linear, adapter: Adapter):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapter, self.on = adapter, True
        self.train(base.training)
        new = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.zeros(adapter.rank, self.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, adapter.rank, **new))
        self.register_parameter("lora_magnitude_vector", None)
        if adapter.dora:
            square = torch.linalg.vector_norm(base.weight.detach(), dim=1, dtype=torch.float32) ** 2
            self.register_buffer("square", square, persistent=False)  # |W|^2, [out]
            self.lora_magnitude_vector = nn.Parameter(self.norm())

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        if not self.on:
            return F.linear(x, self.weight, self.bias)
        low = F.linear(x, self.lora_A.to(x.dtype))  # [.., r]
        delta = F.linear(low, (self.adapter.scale * self.lora_B).to(x.dtype))  # s B A x
        if self.lora_magnitude_vector is None:
            return F.linear(x, self.weight, self.bias) + delta
        y = F.linear(x, self.weight) + delta
        beyond = self.lora_magnitude_vector / self.norm() - 1  # float32 [out]
        y = torch.addcmul(y, y, beyond.to(y.dtype))  # m/n y, without float32 copies of a bf16 y
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def norm(self) -> Tensor:  # -> float32 [out]
        """n = |W + s B A| of each row, W being the original; no graph, B A is not built."""
        A, B = self.lora_A, self.adapter.scale * self.lora_B
        with torch.autocast(A.device.type, enabled=False):
            inner = 2 * (self.weight.float() @ A.T) + B @ (A @ A.T)  # [out, r]
            return (self.square + (B * inner).sum(1)).clamp(min=TINY).sqrt()

    @torch.no_grad()
    def merge(self) -> Tensor:  # -> [out, in] in the dtype of W
        """The weight of the plain layer that does the same: m/n (W + s B A), rounded once."""
        with torch.autocast(self.weight.device.type, enabled=False):
            W = self.weight.float() + self.adapter.scale * (self.lora_B @ self.lora_A)
            if self.lora_magnitude_vector is not None:
                W *= (self.lora_magnitude_vector / self.norm())[:, None]
        return W.to(self.weight.dtype)


# ---- a whole model -------------------------------------------------------------------------------


def attach(model: PreTrainedModel, adapter: Adapter, generator=None) -> list[nn.Parameter]:
    """Put fresh adapters on the targets, in place, and freeze all else: -> what is to be trained.

    A is Kaiming-uniform as in PEFT, U(-1, 1) / sqrt(in), drawn from the generator on its own device
    so that all devices start alike. The model must be where it stays, in its final dtype: a later
    `model.to(dtype)` would round the adapters too. ValueError if a target names no linear layer.
    """
    trained = wrap(model, chosen(model, adapter.targets), adapter)
    for layer in layers(model).values():
        A = torch.empty(layer.lora_A.shape, device=generator.device if generator else "cpu")
        A.uniform_(-1, 1, generator=generator).div_(math.sqrt(layer.in_features))
        layer.lora_A.data.copy_(A)
    return trained


def layers(model: PreTrainedModel) -> dict[str, Adapted]:
    """The adapted layers by name, in the order of the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def adapter_of(model: PreTrainedModel) -> Adapter:
    """What each of them is; a model has one kind."""
    return next(iter(layers(model).values())).adapter


def linear(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer by name; a head tied to the embeddings is none, it would change both."""
    modules, tied = model.named_modules(), model.get_input_embeddings().weight
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and m.weight is not tied}


def named(model: PreTrainedModel, targets: str | Iterable[str]) -> set[str]:
    """Names of the linear layers that PEFT's `target_modules` means: "all-linear", a regular
    expression of whole names, or last parts of names."""
    found, head = linear(model), model.get_output_embeddings()
    if str(targets).lower() == "all-linear":
        return {name for name, layer in found.items() if layer is not head}
    if isinstance(targets, str):
        return {name for name in found if re.fullmatch(targets, name)}
    return {name for name in found for target in targets if f".{name}".endswith(f".{target}")}


def chosen(model: PreTrainedModel, targets: tuple[str, ...]) -> set[str]:
    """The same for an Adapter's targets. ValueError if one of them names no linear layer."""
    for target in targets:
        if not named(model, [target]):
            known = ", ".join(last_parts(linear(model)))
            raise ValueError(f"targets: no linear layer is called {target!r}, choose from {known}.")
    return named(model, targets or "all-linear")


def last_parts(names: Iterable[str]) -> list[str]:
    """What layers are called, without where they are: ["k_proj", "q_proj", ...]."""
    return sorted({name.rpartition(".")[2] for name in names})


def same(model: PreTrainedModel, wanted: Adapter) -> bool:
    """Whether the model's adapters compute what these would, on the same layers."""
    alike = [(x.rank, x.scale, x.dora) for x in (adapter_of(model), wanted)]
    return alike[0] == alike[1] and layers(model).keys() == chosen(model, wanted.targets)


def wrap(model: PreTrainedModel, names: set[str], adapter: Adapter) -> list[nn.Parameter]:
    """Put an Adapted in the place of each named layer: -> the parameters that train."""
    if layers(model):
        raise ValueError("This model has adapters already: load the base model again.")
    model.requires_grad_(False)
    for name, base in linear(model).items():
        if name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(base, adapter))
    # in the order of the model, fresh or loaded: an optimizer knows its parameters by number
    return [p for p in model.parameters() if p.requires_grad]


def disabled(model: PreTrainedModel) -> AbstractContextManager:
    """Inside, the model is its base, bit for bit: the reference needs no second copy."""
    if not layers(model):
        raise ValueError("This model has no adapters that could be off: its reference is a copy.")
    return changed(model, ((layer, "on", False) for layer in layers(model).values()))


def merged(model: PreTrainedModel) -> AbstractContextManager:
    """Inside, plain layers with merged weights: for decoding, where the adapters would cost most.

    The originals are set aside and put back, never computed back: W + d - d drifts in bf16. Inside
    they take their memory once more. A model without adapters stays as it is. No training inside.
    """
    found = layers(model).values()
    weights = ((x, "weight", nn.Parameter(x.merge(), requires_grad=False)) for x in found)
    return changed(model, chain(weights, ((x, "on", False) for x in found)))


def frozen(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of the adapters' numbers as they are now, by the names of the file."""
    return {k: p.detach().clone() for k, p in stored(model).items()}


def swapped(model: PreTrainedModel, tensors: dict[str, Tensor]) -> AbstractContextManager:
    """Inside, the adapters hold what `frozen` gave: the reference of a run that began with them.

    A backward of what was computed outside finds its numbers again. No training inside.
    """
    return changed(model, ((p, "data", tensors[k]) for k, p in stored(model).items()))


@contextmanager
def changed(model: PreTrainedModel, changes: Iterable[tuple]) -> Iterator[None]:
    """Inside, these attributes (of whom, name, value) are others; whatever ends it, they return.

    The adapters must be in use: `disabled` in `merged` would find no base there.
    """
    if not all(layer.on for layer in layers(model).values()):
        raise ValueError("disabled(), merged() and swapped() do not nest: leave one first.")
    kept = []
    try:
        for thing, name, value in changes:
            kept.append((thing, name, getattr(thing, name)))
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)


# ---- files ---------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper around the model
# PEFT's names of ours
FIELDS = {"r": "rank", "lora_alpha": "alpha", "use_dora": "dora", "use_rslora": "rslora"}
NARROW = {"exclude_modules", "layers_to_transform", "layers_pattern"}  # not all of target_modules
# settings that change no number of a finished adapter
NEUTRAL = NARROW | set(
    "target_modules base_model_name_or_path task_type revision auto_mapping inference_mode "
    "megatron_core qalora_group_size lora_dropout peft_version".split()
)
# what others may be (other `init_lora_weights` change the base as well); the rest, later inventions
# included, must be switched off
KNOWN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
OFF = (None, False, 0, "", [], {})


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the adapters alone, as PEFT does: adapter_model.safetensors and adapter_config.json."""
    if not layers(model):
        raise ValueError("This model has no adapters to save.")
    adapter = adapter_of(model)
    config = {theirs: getattr(adapter, ours) for theirs, ours in FIELDS.items()}
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    config |= {"base_model_name_or_path": model.name_or_path or None, "inference_mode": True}
    config["target_modules"] = sorted(adapter.targets) or last_parts(layers(model))
    tensors = {k: p.detach().cpu().contiguous() for k, p in stored(model).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, WEIGHTS), metadata={"format": "pt"})
    content = adapter.file or json.dumps(config, indent=2, sort_keys=True).encode()
    Path(folder, CONFIG).write_bytes(content)


def load(model: PreTrainedModel, folder: str | Path) -> list[nn.Parameter]:
    """Attach the adapters of a folder that `save` or PEFT wrote: -> what is to be trained.

    They become float32. ValueError if a file is missing, broken or not whole, if they belong to
    another model (which then is no use any more), or are a kind of adapter that is not here.
    """
    for name in (CONFIG, WEIGHTS):
        if not Path(folder, name).is_file():
            raise ValueError(f"{folder} holds no adapter: {name} is not there.")
    adapter, names = read_config(model, Path(folder, CONFIG))
    try:
        tensors = load_file(Path(folder, WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{folder}/{WEIGHTS} is broken: {error}") from None
    if not tensors:
        raise ValueError(f"{folder}/{WEIGHTS} holds no tensors: save the adapters again.")
    if names is None:  # the tensors alone say it
        names = {k.removeprefix(PREFIX).partition(".lora_")[0] for k in tensors}
    trained, own = wrap(model, names, adapter), stored(model)
    for k in sorted(own.keys() | tensors.keys()):
        given, wanted = (tuple(x[k].shape) if k in x else "missing" for x in (tensors, own))
        if given != wanted:
            raise ValueError(
                f"{folder} does not fit this model and its own {CONFIG}: the shape of {k} is "
                f"{given} there and {wanted} here."
            )
        if not torch.isfinite(tensors[k]).all():
            raise ValueError(f"{folder}/{WEIGHTS}: {k} holds numbers that are not finite.")
        own[k].data.copy_(tensors[k])
    return trained


def read_config(model: PreTrainedModel, file: Path) -> tuple[Adapter, set[str] | None]:
    """PEFT's adapter_config.json, if it asks for nothing that is not here, and the layers that it
    names: None where it names none, "as usual", or only some of its targets."""
    content = file.read_bytes()
    try:
        config = {"peft_type": None, "r": 8, "lora_alpha": 8} | json.loads(content)  # its defaults
        ours = {FIELDS[k]: v for k, v in config.items() if k in FIELDS}
        adapter = Adapter(**ours, file=content)
        whole = config.get("target_modules") and all(config.get(k) in (None, []) for k in NARROW)
        names = named(model, config["target_modules"]) if whole else None
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{file} does not describe an adapter: {error}") from None
    others = {k: v for k, v in config.items() if k not in FIELDS and k not in NEUTRAL}
    refused = [f"{k} {v!r}" for k, v in others.items() if v not in KNOWN.get(k, OFF)]
    if refused:
        raise ValueError(
            f"{file} asks for {', '.join(refused)}: only plain LoRA and DoRA of linear layers are "
            "here, merge such an adapter into its base with PEFT and load the result."
        )
    return adapter, names


def stored(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The adapters' parameters under PEFT's names; magnitudes go without `.weight`."""
    return {
        f"{PREFIX}{name}" + (".weight" if name.endswith(("_A", "_B")) else ""): p
        for name, p in model.named_parameters()
        if ".lora_" in name
    }


def save_merged(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a whole model with merged weights, in the base's dtype, for programs without DoRA."""
    with merged(model):
        plain = {k: v for k, v in model.state_dict().items() if ".lora_" not in k}
        model.save_pretrained(folder, state_dict=plain)
