"""A run's folder: who writes to it, and the checkpoints that a killed run goes on from.

    RUN/.lock          held by the process that writes here; the system lets go however it dies
    RUN/checkpoint/    the last whole step: a model folder that from_pretrained loads, and beside it
        optimizer.safetensors    AdamW's moments, by the names of the parameters
        random.safetensors       the random generator of the samples
        reference.safetensors    the adapters that the run began with, if it loaded some
        state.json               the counts, and a checksum of every file; written last
    RUN/checkpoint-10/ an older one

A checkpoint without its state.json does not count. All is safetensors and JSON: none runs code.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy import Policy, files
from upkeep import ranks
from upkeep.machine import write
from weights import checksum

KEPT = 2  # newest checkpoints, the last one included
SKIPS = 4  # optimizer steps in a row that may be skipped
LAST, FRESH = "checkpoint", "checkpoint.new"
REFERENCE = "reference.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter
COUNTS = ("step", "drawn", "teaching", "idle", "skipped", "seconds", "data", "model")  # of a State


@dataclass
class State:
    """What changes while training, beside the weights."""

    optimizer: torch.optim.AdamW
    generator: torch.Generator  # draws the samples; on the CPU
    step: int = 0
    drawn: int = 0  # examples taken from the endless, shuffled training data
    teaching: int = 0  # groups that the last step was trained on
    idle: int = 0  # steps in a row without one
    skipped: int = 0  # optimizer steps in a row whose loss or gradient was not finite
    seconds: float = 0.0  # of the sessions before this one, which began at `begin`
    begin: float = field(default_factory=time.time)
    data: str = ""  # fingerprint of the rows
    model: str = ""  # and of the model that the run began with
    complete: bool = True  # the weights are those after `step` whole steps
    random: Tensor = field(init=False)  # the generator's state, as it was then

    def __post_init__(self):
        self.random = self.generator.get_state()

    @property
    def diverged(self) -> bool:
        """Whether so many steps were skipped that nothing is to be saved."""
        return self.skipped >= SKIPS

    def count(self, drawn: int, teaching: int) -> None:
        """A step is done. One that is cut short is not counted, and its prompts come again."""
        self.step, self.drawn, self.teaching = self.step + 1, self.drawn + drawn, teaching
        self.idle = 0 if teaching else self.idle + 1
        self.complete, self.random = True, self.generator.get_state()

    def elapsed(self) -> float:  # seconds of all sessions
        return self.seconds + time.time() - self.begin

    def set_generators(self) -> None:
        """Draw on as after the last whole step, whatever drew since then."""
        self.generator.set_state(self.random)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, no other run writes to this folder. ValueError if one does already."""
    if ranks.rank():  # rank 0 holds it for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(file.fileno()).st_ino == lock.stat().st_ino  # not one just given up
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            raise ValueError(f"{folder} is in use by another run: give another --out")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing was written


def is_empty(folder: Path) -> bool:
    """Whether nothing was ever kept here; a kill may have left the lock or half a file."""
    return all(path.name == ".lock" or path.suffix == ".draft" for path in folder.iterdir())


def save(folder: Path, policy: Policy, state: State) -> None:
    """Write folder/checkpoint, rank 0 with the shards of all; keep the newest `KEPT` of them.

    ValueError, and what was there stays, if weights are not finite or the disk is full.
    """
    weights = ranks.collect(policy.model.state_dict(keep_vars=True))
    averages = {  # none before AdamW's first step
        f"{name}|{moment}": state.optimizer.state[p][moment].contiguous()
        for name, p in policy.model.named_parameters()
        if p in state.optimizer.state
        for moment in MOMENTS
    }
    averages = ranks.collect(averages)
    if ranks.rank():
        return
    if not all(torch.isfinite(p).all() for p in weights.values()):
        raise ValueError(f"step {state.step}: weights are not finite, not saved: lower --lr")
    fresh = folder / FRESH
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fill(fresh, policy, state, weights, averages)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise ValueError(
            f"the checkpoint of step {state.step} cannot be written ({error}): make room, then go "
            f"on with --resume {folder}"
        ) from None
    promote(folder)
    for old in sorted(complete(folder), key=step_of)[:-KEPT]:
        shutil.rmtree(old)


def promote(folder: Path) -> None:
    """Make the fresh checkpoint the last one. A kill at any point leaves what it needs to go on."""
    fresh, last = folder / FRESH, folder / LAST
    if last in complete(folder) and step_of(last)[0] != step_of(fresh)[0]:
        older = folder / f"{LAST}-{step_of(last)[0]}"
        shutil.rmtree(older, ignore_errors=True)
        last.rename(older)
    shutil.rmtree(last, ignore_errors=True)  # one of the same step, or what a kill left of it
    fresh.rename(last)


def fill(fresh: Path, policy: Policy, state: State, weights: dict, averages: dict) -> None:
    """The files of a checkpoint, state.json last and at one stroke."""
    policy.save(fresh, weights)
    save_file(averages, fresh / "optimizer.safetensors")
    save_file({"samples": state.random}, fresh / "random.safetensors")
    if policy.began:
        save_file(policy.began, fresh / REFERENCE)
    counts = {name: getattr(state, name) for name in COUNTS} | {"seconds": state.elapsed()}
    counts["sha256"] = {path.name: checksum(path) for path in sorted(fresh.iterdir())}
    write(fresh / "state.json", json.dumps(counts | {"seal": seal(counts)}, indent=1) + "\n")


def seal(counts: dict) -> str:  # a checksum of state.json itself
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()


def fingerprint(name: str) -> str:
    """The same for the same model: a run that goes on must find the one that it began with."""
    sums = [(file.name, checksum(file)) for file in files(name)]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def complete(folder: Path) -> list[Path]:
    """The checkpoints here, also those that a kill left under another name."""
    return [path.parent for path in folder.glob(f"{LAST}*/state.json")]


def step_of(checkpoint: Path) -> tuple[int, bool]:
    """The step of a checkpoint; of two of one step the folder `checkpoint` is the later."""
    return read_state(checkpoint)["step"], checkpoint.name == LAST


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from, if there is one. ValueError names a file that is damaged."""
    if (folder / FRESH / "state.json").is_file():  # a kill came before it got its place
        promote(folder)
    last = max(complete(folder), key=step_of, default=None)
    saved = read_state(last)["sha256"] if last else {}
    for name in saved:
        if not (last / name).is_file() or checksum(last / name) != saved[name]:
            raise damaged(last / name)
    return last


def read_state(checkpoint: Path) -> dict:
    """The counts and checksums of a checkpoint."""
    file = checkpoint / "state.json"
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        counts = json.loads(file.read_text(encoding="utf-8"))
        if counts.pop("seal") == seal(counts):
            return counts
    raise damaged(file)


def damaged(file: Path) -> ValueError:
    return ValueError(
        f"{file} is damaged: delete the folder {file.parent.name} to go on from an older "
        "checkpoint, or start a new run"
    )


def restore(checkpoint: Path, policy: Policy, state: State) -> None:
    """Put what `save` wrote into a fresh state; the policy is already that of the checkpoint."""
    counts = {"model": state.model, "teaching": 0} | read_state(checkpoint)  # older ones lack them
    for name, what in (("data", "the rows of --data are"), ("model", "the files of --model are")):
        if counts[name] != getattr(state, name):
            raise ValueError(
                f"{what} not those that the run began with: put them back, or start a new run"
            )
    for name in COUNTS:
        setattr(state, name, counts[name])
    parameters = dict(policy.model.named_parameters())
    for key, moment in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        p = parameters[name]
        state.optimizer.state[p][kind] = moment if kind == "step" else ranks.like(moment, p)
    state.random = load_file(checkpoint / "random.safetensors")["samples"]
    if (checkpoint / REFERENCE).is_file():
        kept, device = load_file(checkpoint / REFERENCE), policy.model.device
        # copied: tensors that lie askew in memory, as in a file, give another last digit
        policy.began = {name: tensor.to(device, copy=True) for name, tensor in kept.items()}
