"""What this machine gives to a process: a device, CPU threads, memory, and signals to stop.

Not here: anything about models or training.
"""

import contextlib
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

SMALL = 5e7  # weights of a model that gains nothing from bf16


def use_threads(asked: int) -> int:
    """Tell torch how many CPU threads to use, 0 for as many as this process may; -> how many."""
    count = asked or min(allowed_cpus(), torch.get_num_threads())
    torch.set_num_threads(count)
    return count


def allowed_cpus() -> int:
    """Cores that this process may run on: its affinity, and the quota of its control group."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(affinity or 1, cpu_quota(Path("/sys/fs/cgroup"))))


def cpu_quota(folder: Path) -> int:
    """Whole cores that a control group grants (version 2, then 1); a large number without one."""
    for name, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (folder / name).read_text().split()
            words += (folder / period).read_text().split() if period else []
            quota, length = words[:2]
            return max(1, round(int(quota) / int(length))) if int(quota) > 0 else 2**15
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
    return 2**15


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


def peak_memory(device: str | torch.device) -> float:
    """Most memory this process ever held, in GB (10^9 bytes): of the GPU where there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def chosen_device(device: str) -> str:
    """The device asked for; auto takes the GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU on this machine; use --device cpu")
    if device not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError):  # as torch says of mps and of cuda:0
            raise ValueError(f"--device {device}: none on this machine; use --device cpu") from None
    return device


@contextlib.contextmanager
def patient() -> Iterator[list[int]]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP are noted in the list, so that a step can end; a second
    one does not wait. Those that the shell told this process to ignore (nohup) stay ignored.
    """
    noted: list[int] = []

    def note(number, frame) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        with contextlib.suppress(OSError):  # SIGHUP: the terminal is gone. Unbuffered, since
            os.write(2, b"\nstopping after this step; once more stops at once\n")  # tqdm may write

    polite = [s for s in POLITE if signal.getsignal(s) is not signal.SIG_IGN]
    handlers = {s: signal.signal(s, note) for s in polite}
    try:
        yield noted
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
