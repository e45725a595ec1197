"""machine.py: threads that a process may really use."""

import pytest
import torch

import packed
from upkeep import machine


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 2),  # 1.5 cores
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "20000 100000"}, 1),  # a fifth of one
        ({"cpu.max": "max 100000"}, 2**15),  # no limit
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 2**15),
        ({}, 2**15),
    ],
)
def test_the_quota_of_a_container_counts(tmp_path, files, cores):
    """Prevents: 64 threads on two cores, where a step takes nine times as long."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.cpu_quota(tmp_path) == cores


def test_threads_are_those_asked_for(monkeypatch):
    """Prevents: a setting that torch never hears of."""
    before = torch.get_num_threads()
    try:
        assert machine.use_threads(1) == torch.get_num_threads() == 1
        torch.set_num_threads(8)
        monkeypatch.setattr(machine, "allowed_cpus", lambda: 3)
        assert machine.use_threads(0) == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("low", "best"), [(1.0, torch.bfloat16), (3.0, torch.float32)])
def test_the_faster_dtype_is_taken_and_told(monkeypatch, capsys, low, best):
    """Prevents: bf16 on a processor without units for it, where it takes five times as long."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    seconds = {torch.bfloat16: low, torch.float32: 2.0}
    monkeypatch.setattr(packed, "product_seconds", lambda layer, dtype: seconds[dtype])
    assert packed.faster_dtype(model) == torch.float32  # small
    monkeypatch.setattr(packed, "SMALL", 1)
    assert packed.faster_dtype(model) == best
    assert capsys.readouterr().err.startswith(str(best)[6:])
