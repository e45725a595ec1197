"""What this machine gives to a process: a device, CPU threads, memory, and signals to stop.

Not here: anything about models or training.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


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


def return_freed_memory() -> None:
    """Let freed tensors of 2 MB or more go back to the system at once, where glibc has the heap.

    Left alone it keeps the holes that activations of many sizes leave behind: three passes of
    Qwen2.5-Coder-0.5B, forwards and backwards, held 7.4 GB at most, and so 4.6.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**21)


M_MMAP_THRESHOLD = -3  # of malloc.h


def peak_memory(device: str | torch.device) -> float:
    """Most memory this process ever held, in GB (10^9 bytes): of the GPU where there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
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
