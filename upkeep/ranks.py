"""Several processes, one run: `torchrun --nproc-per-node 2 recode.py ...`, a rank for each GPU.

Every rank holds the whole policy and state, and all do the same, but for two things: each samples
its share of the prompts, and sends its share of the groups through the model. In between all know
all rollouts, so that weights and summed gradients are those of one process. Rank 0 alone writes.

With --shard a rank holds only its rows of every weight, gradient and average of AdamW, by torch's
`fully_shard`: of their 16 bytes a weight, 16 / W in training with W ranks. A layer is whole while
it computes, and all are while the ranks sample or grade, each its own number of tokens (4 + 12 / W
bytes): so the weights must fit one card. The reference of the KL stays whole.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from policy import Policy
from rollout import Rollout, join, numbers, packs


def begin(device: str) -> str:
    """Meet the other ranks, if torchrun started some; -> the device of this one."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if world() > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


def rank() -> int:
    """The number of this process, as torchrun says."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


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


def sample(policy: Policy, prompts: list[list[int]], *, generator, **how) -> Rollout:
    """Policy.sample, each rank its share of the prompts with the numbers that they have among all.

    A rank without a share samples the first prompt along with the others, and gives nothing.
    """
    if world() == 1:
        return policy.sample(prompts, generator=generator, **how)
    uniform = numbers(how["max_new_tokens"], len(prompts), how["group_size"], generator)
    mine = share(range(len(prompts)))
    chosen = mine or [0]
    with gathered(policy.model):
        some = [prompts[b] for b in chosen]
        rollout = policy.sample(some, uniform=uniform[:, chosen], **how)
    return join(gather([rollout.pick([b]) for b in range(len(mine))]))


def passes(
    model: nn.Module, rollout: Rollout, weight: Tensor, budget: int, groups: list[int] | None = None
) -> list[tuple[list[int], Tensor]]:
    """This rank's packs of these groups (all), each with the weight of its tokens [b, G, T].

    Ranks that share the weights make each pass together: one with fewer packs goes along with a
    group of weight 0.
    """
    groups = list(range(len(weight))) if groups is None else groups
    mine = packs(rollout, budget, share(groups))
    idle = max(gather([len(mine)])) - len(mine) if isinstance(model, FSDPModule) else 0
    along = [(groups[:1], torch.zeros_like(weight[groups[:1]]))] * idle
    return [(pack, weight[pack]) for pack in mine] + along


def add_gradients(weights: list[Tensor]) -> None:
    """Sum each weight's gradient over the ranks; one that a rank has not computed is 0."""
    if world() == 1 or isinstance(weights[0], DTensor):  # a backward of `shard` has summed already
        return
    for w in weights:
        w.grad = torch.zeros_like(w) if w.grad is None else w.grad
        dist.all_reduce(w.grad)


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- Shards: each rank holds its rows of every tensor --------------------------------------------


def shard(model: nn.Module, score: Callable) -> Callable:
    """Leave each rank its rows of every weight -> `score`, which runs the model, to be called so.

    Every such call waits for all ranks, and so does its backward, which sums the gradients: all
    must make as many.
    """
    mesh = init_device_mesh(model.device.type, (world(),))
    layers = list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))
    for module, before in zip([*layers, model], [layers[0], *layers], strict=True):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum, where torch would take the mean,
        module.set_force_sum_reduction_for_comms(True)  # which gloo does not know
        # Left to itself, backward fetches in the order of all forwards since the last one, those of
        # sampling included; they differ from rank to rank, and what one fetches all must send.
        module.set_modules_to_backward_prefetch([before])
    with torch.no_grad(), gathered(model):  # what runs first has to be the model, not a layer of it
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    model.score = score  # it enters the model by its parts, unseen but for this
    register_fsdp_forward_method(model, "score")
    return model.score


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, all weights are here, and a forward waits for nobody; there is no backward."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def full(x: Tensor) -> Tensor:
    """x with the rows of all ranks, which must all ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def collect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On rank 0 the tensors with all their rows, those of shards on the CPU; elsewhere nothing."""
    found: dict[Tensor, Tensor] = {}
    for x in tensors.values():
        if isinstance(x, DTensor) and x not in found:  # tied weights are one
            rows = full(x)  # one at a time: all would not fit
            found[x] = x if rank() else rows.cpu()
    return {} if rank() else {name: found.get(x, x).detach() for name, x in tensors.items()}


def like(x: Tensor, weight: Tensor) -> Tensor:
    """x on the weight's device: its rows that this rank has of the weight, or all."""
    x = x.to(weight.device)
    if not isinstance(weight, DTensor):
        return x
    return distribute_tensor(x, weight.device_mesh, weight.placements, src_data_rank=None)
