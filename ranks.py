"""Several processes, one run: `torchrun --nproc-per-node 2 recode.py ...`, a rank for each GPU.

Every rank holds the whole policy and state, and all do the same, but for two things: each samples
its share of the prompts, and sends its share of the groups through the model. In between all know
all rollouts, so that dead groups, refills and weights are those of the whole batch, and the summed
gradients are what one process would have had. Rank 0 alone writes and prints.

In one process nothing here does anything. Not here: models that do not fit one card.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def begin(device: str) -> str:
    """Meet the other ranks, if torchrun started some; -> the device of this one."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if world() > 1 and device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{torch.cuda.current_device()}"
    return device


def rank() -> int:
    """The number of this process, as torchrun says."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 goes through the block first, then the others."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


def share(items: Sequence) -> list:
    """What of these is this rank's: every world-th, from its own number on."""
    return list(items[rank() :: world()])


def gather(mine: list) -> list:
    """The shares of all ranks in the order of the whole: the inverse of `share`."""
    if world() == 1:
        return mine
    shares = [None] * world()
    dist.all_gather_object(shares, mine)
    longest = max(map(len, shares))
    return [part[i] for i in range(longest) for part in shares if i < len(part)]


def add(numbers: dict[str, float]) -> Counter:
    """Numbers by name, summed over the ranks."""
    total = Counter()
    for part in gather([dict(numbers)]):
        total.update(part)
    return total


def add_gradients(weights: list[Tensor]) -> None:
    """Sum each weight's gradient over the ranks; one that a rank has not computed is 0."""
    if world() == 1:
        return
    flat = torch.cat(
        [(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights]
    )
    dist.all_reduce(flat)
    for w, grad in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.grad = grad.view_as(w)


def agree(flag: bool) -> bool:
    """Whether any rank says so: all stop at the same step, or one would wait for ever."""
    return any(gather([flag]))


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
