"""How much memory a run will need, before it needs it: counted from the shapes, nothing allocated.

    parts = estimate(skeleton(pretrained_model_name_or_path="folder"), Run(prompts=8, lora=16))
    print(table(parts, available("cuda")))
    check(parts, available("cuda"))

A run is as large as its fullest phase: loading, sampling, grading, training on one pack, or the
optimizer's step. Each holds what is kept all the time (weights, adapters, optimizer, reference) and
its own. Counted are tensors as PyTorch keeps them for a decoder of Llama's kind (Qwen2, Qwen3,
SmolLM2): RMS norms, gated MLP, rotary positions. Other kinds come out roughly.

Not counted: torch itself, an allocator's gaps, scratch space inside a kernel, what `trim` copies
while it drops finished samples, a mixture's experts beyond their weights.

Shapes: B prompts, G samples a prompt, N = B*G, P prompt and T completion length, C hidden and I
inner width, H query and K key heads of width D, V vocabulary, L tokens of a pack, M sampled ones.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import lora
import rollout

Parts = dict[str, dict[str, float]]  # phase -> part -> GB

FULL, GB = 4, 1e9  # bytes of a float32


@dataclass(frozen=True)
class Run:
    """The settings that memory depends on, by the names of Config; `prompt` is P in tokens."""

    prompts: int = 16
    group_size: int = 8  # 1 for sft
    prompt: int = 512
    max_new_tokens: int = 384
    pack_tokens: int = 2048
    checkpointing: bool = False
    dtype: str = "float32"
    lora: int = 0
    dora: int = 0
    # Last parts of the adapted layers' names, as q_proj,v_proj; "" is all. Activations are planned
    # for all: with these two a quarter too much.
    targets: str = ""
    reference: bool = False  # beta > 0: without adapters the untrained model is a second copy
    graded: int = 64  # rows that grading answers at a time, once each
    cuda: bool = False
    shards: int = 1  # ranks that share weights, gradients and averages while training

    @property
    def rank(self) -> int:
        return self.lora or self.dora

    def adapter(self, size: tuple[int, int]) -> int:
        """Numbers in the adapter of one matrix [out, in]."""
        return self.rank * sum(size) + (size[0] if self.dora else 0)

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.dtype == "bfloat16" else FULL


def skeleton(**where) -> PreTrainedModel:
    """The model without its numbers, on the meta device; `where` as for from_pretrained."""
    config = AutoConfig.from_pretrained(**where)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# ---- the phases ----------------------------------------------------------------------------------


def estimate(model: PreTrainedModel, run: Run) -> Parts:
    """GB of every part in every phase. The model may be loaded, adapted, or a skeleton."""
    head = model.get_output_embeddings().weight
    matrices = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    matrices = {name: W.shape for name, W in matrices.items() if W is not head}
    sizes = matrices.values()
    adapted = [matrices[name] for name in lora.chosen(model, lora.targets_of(run.targets))]
    linear, extra = sum(map(math.prod, sizes)), sum(map(run.adapter, adapted))
    base = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    trained = (extra or base) / run.shards
    low = run.element if run.rank else FULL  # bytes of a base weight
    kept = {"weights": base * low / run.shards, "adapters": extra * FULL}
    kept |= {"optimizer": 2 * trained * FULL}  # AdamW's two averages
    kept |= {"reference": base * FULL if run.reference and not run.rank else 0}
    # Autocast keeps a bf16 copy of every float32 matrix that trains, as long as it lasts.
    cast = {"bf16 copies": 2 * (linear + head.numel()) if run.element < low else 0}
    fresh = max(map(math.prod, sizes)) * FULL  # of one matrix: its merge, or its new gradient
    replaced = sum(map(math.prod, adapted)) if run.rank else 0
    merged = {"merged weights": replaced * low + fresh if run.rank else 0}
    gradients = {"gradients": trained * FULL}
    pack = of_pack(model.config, run, 0 if run.rank else fresh)
    # with the graph go s B and, in bf16, A too; or the head's new gradient beside the old one
    pack["activations"] += extra * run.element / (2 if run.element == FULL else 1)
    pack["head"] += 0 if run.rank else head.numel() * FULL
    phases = {"loading": {"float32 weights": base * FULL}}  # before they become bf16
    graded = replace(run, prompts=run.graded, group_size=1)
    for phase, drawn in {"sampling": run, "grading": graded}.items():
        phases[phase] = kept | cast | merged | of_sampling(model.config, drawn)
    phases["training"] = kept | cast | gradients | pack
    if run.shards > 1:  # all weights are whole while it samples, in a pass what is at work
        for phase in ("sampling", "grading"):
            phases[phase]["gathered weights"] = base * FULL
        # embeddings and head, their gradients, and these on their way; or one less and two layers,
        # the gradients of one, and these on their way
        rest, layer = base - linear, linear / model.config.num_hidden_layers
        phases["training"]["gathered weights"] = max(3 * rest, 2 * rest + 4 * layer) * FULL
    # on a GPU AdamW takes the roots of all second averages at once
    phases["step"] = kept | gradients | {"roots": trained * FULL if run.cuda else 0}
    return {
        phase: {part: size / GB for part, size in parts.items() if size}
        for phase, parts in phases.items()
    }


def of_sampling(config: PretrainedConfig, run: Run) -> dict[str, float]:
    """Bytes of sampling: B prompts at once, then one token of each of N samples at a time."""
    C, inner, H, K, D = widths(config)
    B, N, P, T = run.prompts, run.prompts * run.group_size, run.prompt, run.max_new_tokens
    a_token = 2 * K * D * run.element  # keys and values of one layer
    room = 1 if T <= 2 else 64 * 2 ** max(0, math.ceil(math.log2((T - 1) / 64)))  # see Cache.write
    prompts = config.num_hidden_layers * a_token * B * P
    cache = prompts + config.num_hidden_layers * a_token * N * room
    stream = run.element if run.rank else FULL  # bytes of what goes from layer to layer
    # of a prompt's token in a layer: MLP or rotation beside stream and norm, or the norm at work
    widest = max(3 * inner, 5 * H * D) * run.element + 2 * C * stream
    prefill = B * P * max(widest, C * (stream + 3 * FULL))
    scores = 12 * N * H * (P + T)  # to the prompt, to itself, both, their softmax
    doubling = N * a_token * room / 2  # the old buffer of the layer that moves into a new one
    chances = 4 * N * config.vocab_size * FULL  # logits, logp, probabilities, their sums
    full = max(prompts + prefill, cache + max(scores, doubling, chances))
    return {"cache": cache, "decoding": full - cache + 16 * N * T}  # 16: the rollout itself


def of_pack(config: PretrainedConfig, run: Run, fresh: int) -> dict[str, float]:
    """Bytes of one pack between forward and backward, the pack as full as it can be."""
    C, inner, _, _, D = widths(config)
    P, T, group = run.prompt, run.max_new_tokens, run.prompt + run.group_size * run.max_new_tokens
    L = min(max(run.pack_tokens, group), run.prompts * group)
    rows = run.group_size * L / group  # completions
    M, masks = rows * T, rows * T * (P + T)
    # a mask is float32; score_attention casts it, in each layer anew
    layer = saved(config, run, L, rows) + (masks * run.element if run.element < FULL else 0)
    stream = L * C * (run.element if run.rank else FULL)  # what enters a layer
    graph = config.num_hidden_layers * (stream if run.checkpointing else layer)
    graph += masks * FULL + 2 * L * D * FULL  # and the rotary angles
    # backward begins at the head: log-softmax, its gradient, theirs; last norm
    logits = min(M * config.vocab_size, max(rollout.LOGITS, config.vocab_size))
    head = 3 * logits * FULL + 3 * L * C * FULL + M * C * run.element
    # then each layer: its gradients, and with checkpointing the layer itself once more
    work = L * 2 * (inner + C) * run.element + fresh + (layer if run.checkpointing else 0)
    return {"activations": graph + max(0, work - head), "head": head}


def saved(config: PretrainedConfig, run: Run, L: float, rows: float) -> float:
    """Bytes that one layer keeps for backward, for L tokens with this many completions."""
    C, inner, H, K, D = widths(config)
    e, full, kv = run.element, not run.rank, 2 * K * D
    normed = 2 * C  # what goes through RMS norms
    if config.model_type.startswith("qwen3"):  # it norms queries and keys too
        normed += H * D + kv / 2
    wide = normed * (1 + full)  # x in float32, and x / |x| where the norm's weight trains
    # what the matrices take in; autocast casts a float32 one for each of q, k, v, gate, up anew
    taken = (5 if full and e < FULL else 2) * C
    rest = 3 * H * D + kv + 4 * inner + 7 * run.rank  # attention, MLP, A x
    if run.dora:  # y before m / n, of all seven matrices
        rest += H * D + kv + 2 * C + 2 * inner
    repeated = H / K if run.cuda else 1  # fused_attention repeats key heads there
    copied = rows * (run.prompt + run.max_new_tokens) * kv * repeated  # see score_attention
    return L * (wide * FULL + (taken + rest) * e) + copied * e


def widths(config: PretrainedConfig) -> tuple[int, int, int, int, int]:
    """C, I, H, K, D."""
    C, H = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * C
    D = getattr(config, "head_dim", None) or C // H
    return C, inner, H, getattr(config, "num_key_value_heads", None) or H, D


# ---- what is done with it ------------------------------------------------------------------------

LOWER = {  # by part: what makes it smaller
    "float32 weights": "take a smaller --model",
    "weights": "take a smaller --model, or --lora with --dtype bfloat16",
    "gathered weights": "take a smaller --model",
    "merged weights": "take a smaller --model, or --dtype bfloat16",
    "adapters": "lower the rank in --lora or --dora",
    "cache": "lower --prompts, --group-size or --max-new-tokens",
    "decoding": "lower --prompts, --group-size or --max-new-tokens",
    "activations": "lower --pack-tokens (one group is the least: --group-size x "
    "--max-new-tokens) or add --checkpointing",
    "head": "lower --pack-tokens",
    "reference": "give --lora, which needs no copy, or --beta 0",
}
ELSE = "train adapters with --lora in place of all weights"


def peak(parts: Parts) -> tuple[str, float]:
    """The fullest phase and its GB."""
    return max(((phase, sum(part.values())) for phase, part in parts.items()), key=lambda x: x[1])


def table(parts: Parts, free: float) -> str:
    """A line a phase, its parts from the largest down; GB are 10^9 bytes."""
    lines = []
    for phase, part in parts.items():
        ranked = sorted(part.items(), key=lambda x: -x[1])
        words = ", ".join(f"{name} {size:.1f}" for name, size in ranked if size >= 0.05)
        lines.append(f"  {phase:8} {sum(part.values()):6.1f} GB  {words}".rstrip())
    phase, most = peak(parts)
    return "\n".join([f"memory planned: {most:.1f} GB in {phase}, {free:.1f} GB free", *lines])


def check(parts: Parts, free: float) -> None:
    """ValueError in one sentence if the fullest phase does not fit into `free` GB."""
    phase, most = peak(parts)
    if most > free:
        name, size = max(parts[phase].items(), key=lambda x: x[1])
        raise ValueError(
            f"{phase} would need {most:.1f} GB and {free:.1f} GB are free; the largest part is "
            f"{name} with {size:.1f} GB: {LOWER.get(name, ELSE)}"
        )


def available(device: str | torch.device) -> float:
    """GB that this process may still take, of the GPU or of the machine; inf if nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GB
    return min(machine_memory(Path("/proc/meminfo")), group_memory(Path("/sys/fs/cgroup"))) / GB


def machine_memory(file: Path) -> float:
    """MemAvailable in bytes; the file counts in KiB."""
    if not file.is_file():
        return math.inf
    fields = dict(line.split(":") for line in file.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def group_memory(folder: Path) -> float:
    """Bytes that the control group (version 2, then 1) has left; pages of files count as free."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / used).with_name("memory.stat").open())
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
        return left + int(stat.get("inactive_file", 0))
    return math.inf
