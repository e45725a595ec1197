"""Multiply from packed weights while tokens are sampled on a CPU: the same products, sooner.

    with packed(model, torch.bfloat16):
        rollout = sample(model, ...)

A matrix as torch keeps it, row by row, is put into blocks for the processor's units anew at every
product; for the few rows of a decoding step that takes longer than the product. oneDNN, which torch
carries, can keep the blocks. A reader may skip this file: without it all is the same, but slower.

Adapters stay beside their layer and are not merged: W in bf16 has 8 bits, and would swallow what is
small in B A. Not here: training, which has many rows, and GPUs, which need no packing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import lora

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


OPERATORS = "_reorder_linear_weight", "_linear_pointwise"
