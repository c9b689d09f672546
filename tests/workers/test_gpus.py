"""Which GPUs a worker has and hands out."""

import os
from pathlib import Path

import pytest

from service.settings import Settings
from workers.gpus import GpuPool, find_gpus


def test_a_list_and_none() -> None:
    assert find_gpus(Settings(gpus="0, 2")) == ["0", "2"]
    assert find_gpus(Settings(gpus="none")) == []
    for wrong in ("two", "0,0", "", "-1"):
        with pytest.raises(ValueError, match="Use auto, none, or indices"):
            find_gpus(Settings(gpus=wrong))


def test_auto_keeps_to_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert find_gpus(Settings()) == ["3", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus(Settings()) == []


def test_auto_asks_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A'\necho '  MIG 1g: x'\necho 'GPU 1: B'\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_gpus(Settings()) == ["0", "1"]


def test_the_pool() -> None:
    pool = GpuPool(["0", "1", "2"])
    assert (pool.needed(None), pool.needed(0), pool.needed(2)) == (1, 0, 2)
    assert GpuPool([]).needed(None) == 0
    taken = pool.take(2)
    assert (taken, pool.free) == (("0", "1"), 1)
    with pytest.raises(ValueError, match="1 free"):
        pool.take(2)
    pool.give_back(taken)
    assert (pool.free, pool.total) == (3, 3)
