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
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import lora

OPERATORS = "_reorder_linear_weight", "_linear_pointwise"
SMALL = 5e7  # weights of a model that gains nothing from bf16
ROWS = 32  # that the blocks are made for; other numbers of rows work too


class Pack:
    """A linear layer from packed weights: x [.., in] -> x W^T + b [.., out], adapters included."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        self.dtype, self.beyond = dtype, None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), ROWS)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.adapted = isinstance(layer, lora.Adapted) and layer.on
        if self.adapted:
            self.A = layer.lora_A.detach().T.to(dtype)  # [in, r]
            self.B = (layer.adapter.scale * layer.lora_B.detach()).T.to(dtype)  # [r, out]
            if layer.lora_magnitude_vector is not None:
                self.beyond = (layer.lora_magnitude_vector.detach() / layer.norm() - 1).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        bias = self.bias if self.beyond is None else None  # DoRA scales before the bias
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        if self.adapted:
            flat = y.flatten(0, -2)
            y = torch.addmm(flat, x.flatten(0, -2) @ self.A, self.B).view_as(y)
        if self.beyond is None:
            return y
        y = torch.addcmul(y, y, self.beyond)  # m/n y, as in training
        return y if self.bias is None else y + self.bias


@contextmanager
def packed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the linear layers of a model on the CPU multiply from packed copies, in `dtype`.

    The copies take the memory of the weights once more. Nothing may change inside: no training,
    and no `lora.disabled`.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        for layer in layers:
            layer.forward = Pack(layer, dtype)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def available(model: nn.Module) -> bool:
    """Whether this torch has oneDNN's operators, for the processor that the model is on."""
    there = all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    return there and next(model.parameters()).device.type == "cpu"


def faster_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which this machine multiplies a layer of the model sooner, said in one line.

    Only some processors have units for bf16: with them it takes half the time of float32, without
    them five times as long. A model of less than `SMALL` weights stays in float32.
    """
    device = next(model.parameters()).device
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if sum(p.numel() for p in model.parameters()) < SMALL or device.type == "mps":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    layer = max(layers[:-1], key=lambda m: m.weight.numel())  # the last one is the head
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
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        x @ weight.T
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
