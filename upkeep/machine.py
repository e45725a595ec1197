"""What this machine gives to a process: CPU threads, memory, signals to stop, whole files."""

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
    return min(affinity or 1, cpu_quota(Path("/sys/fs/cgroup")))


def cpu_quota(folder: Path) -> int:
    """Whole cores that a control group grants (version 2, then 1); a large number without one."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max": no limit
            quota, period = map(int, " ".join((folder / n).read_text() for n in names).split())
            if quota > 0:
                return max(1, round(quota / period))
    return 2**15


def return_freed_memory() -> None:
    """Give back what was freed, where glibc has the heap: it keeps the holes, more at each step."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: str | torch.device) -> float:
    """Most memory this process ever held, in GB (10^9 bytes): of the GPU where there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Inside, the `POLITE` are noted in the list, so that a step can end; a second one does not
    wait. Those that the shell told this process to ignore (nohup) stay ignored."""
    noted: list[int] = []

    def note(number, frame) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        with contextlib.suppress(OSError):  # the terminal is gone; unbuffered: tqdm may write, too
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    polite = [s for s in POLITE if signal.getsignal(s) is not signal.SIG_IGN]
    handlers = {s: signal.signal(s, note) for s in polite}
    try:
        yield noted
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def write(path: Path, text: str) -> None:
    """Replace a file at one stroke: whatever happens, it is the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
