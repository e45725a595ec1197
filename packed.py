"""Multiply from packed weights while tokens are sampled on a CPU: the same products, sooner.

    with packed(model, torch.bfloat16):
        rollout = sample(model, ...)

A matrix as torch keeps it, row by row, is put into blocks for the processor's units anew at every
product; for the few rows of a decoding step that takes longer than the product. oneDNN, which torch
carries, can keep the blocks. A reader may skip this file: without it all is the same, but slower.

Adapters stay beside their layer and are not merged: W in bf16 has 8 bits, and would swallow what is
small in B A. Not here: training, which has many rows, and GPUs, which need no packing.
"""

import statistics
import sys
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora

OPERATORS = "_reorder_linear_weight", "_linear_pointwise"
SMALL = 5e7  # weights of a model whose time goes into small operations, not into products
TOGETHER = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # names of layers of one input
ROWS = 32  # that the blocks are made for; other numbers of rows work too


class Pack:
    """Layers of one input, from packed weights: x [.., in] -> each one's W x + b [.., out].

    What is left beside W costs as much as W where rows are few, so all rows of W and of A make one
    matrix, and all B one of blocks: two products, where q, k and v alone had nine.
    """

    @torch.no_grad()
    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype):
        self.dtype, self.x, self.y = dtype, None, None
        self.sizes = [layer.out_features for layer in layers]
        As, Bs, beyond = zip(*map(beside, layers), strict=True)
        weight = torch.cat([part.to(dtype) for part in (*(m.weight for m in layers), *As)])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.B = torch.block_diag(*Bs).T.to(dtype)  # [rank, out]
        self.rank = len(self.B)
        self.beyond = joined(beyond, self.sizes, dtype)
        bias = joined([layer.bias for layer in layers], self.sizes, dtype)
        at_once = self.beyond is None and bias is not None  # DoRA scales before the bias
        self.first = F.pad(bias, (0, self.rank)) if at_once else None
        self.last = None if at_once else bias

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """The layer at this place. All are computed when the first asks, and let go at the last:
        those of long prompts take gigabytes."""
        if x is not self.x:
            self.x, self.y = x, self.product(x.to(self.dtype)).split(self.sizes, dim=-1)
        y = self.y[place]
        if place == len(self.sizes) - 1:
            self.x = self.y = None
        return y

    def product(self, x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.first, "none", [], "")
        if self.rank:
            y, low = y.split([sum(self.sizes), self.rank], dim=-1)
            y = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.B).view(y.shape)
        if self.beyond is None:
            return y
        y = torch.addcmul(y, y, self.beyond)  # m/n y, as in training
        return y if self.last is None else y + self.last


def beside(layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an adapter puts beside W: A [r, in], s B [out, r], m/n - 1 [out]; r is 0 without one."""
    if not (isinstance(layer, lora.Adapted) and layer.on):
        return layer.weight[:0], layer.weight[:, :0], None
    m, B = layer.lora_magnitude_vector, layer.adapter.scale * layer.lora_B
    return layer.lora_A, B, None if m is None else m / layer.norm() - 1


def joined(parts: Sequence[Tensor | None], sizes: list[int], dtype: torch.dtype) -> Tensor | None:
    """Vectors of these sizes in a row, zeros for one that is missing; None if all are."""
    if all(part is None for part in parts):
        return None
    pairs = zip(parts, sizes, strict=True)
    return torch.cat([torch.zeros(n) if x is None else x for x, n in pairs]).to(dtype)


def together(model: nn.Module) -> list[list[nn.Linear]]:
    """All linear layers; those that may share their input stand in one list."""
    found: dict[tuple, list[nn.Linear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            kind = next((names for names in TOGETHER if last in names), last)
            found.setdefault((parent, kind, layer.in_features), []).append(layer)
    return list(found.values())


@contextmanager
def packed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the linear layers of a model on the CPU multiply from packed copies, in `dtype`.

    The copies take the memory of the weights once more. Nothing may change inside: no training,
    and no `lora.disabled`.
    """
    layers = together(model)
    try:
        for group in layers:
            pack = Pack(group, dtype)
            for place, layer in enumerate(group):
                layer.forward = partial(pack, place=place)
        yield
    finally:
        for layer in sum(layers, []):
            vars(layer).pop("forward", None)


def available(model: nn.Module) -> bool:
    """Whether this torch has oneDNN's operators, for the processor that the model is on."""
    there = all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    return there and next(model.parameters()).device.type == "cpu"


def small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < SMALL


def faster_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which this machine multiplies a layer of the model sooner, said in one line.

    Only some processors have units for bf16: with them it takes half the time of float32, without
    them five times as long. A model of less than `SMALL` weights stays in float32.
    """
    device = next(model.parameters()).device.type
    if small(model) or device == "mps":
        return torch.float32
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    *layers, _ = (m for m in model.modules() if isinstance(m, nn.Linear))  # the last is the head
    layer = max(layers, key=lambda m: m.weight.numel())
    low, full = (product_seconds(layer, dtype) for dtype in (torch.bfloat16, torch.float32))
    best = torch.bfloat16 if low < full else torch.float32
    times = f"{1e3 * low:.1f} ms in bfloat16, {1e3 * full:.1f} in float32"
    print(f"{str(best)[6:]} products: a layer takes {times}", file=sys.stderr)
    return best


@torch.no_grad()
def product_seconds(layer: nn.Linear, dtype: torch.dtype) -> float:
    """Median time of the product of 256 rows with a layer's weight."""
    weight = layer.weight.to(dtype)
    x = torch.ones(256, weight.shape[1], dtype=dtype)
    return statistics.median(timeit.repeat(lambda: x @ weight.T, number=1))
