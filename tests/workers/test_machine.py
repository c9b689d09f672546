"""What a worker says of its machine."""

import os
from pathlib import Path

import pytest

from workers.machine import describe_machine

CORES = len(os.sched_getaffinity(0))


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def cpu_info(tmp_path: Path) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name\t: Fastest CPU @ 9 GHz\nmodel name : Another\n")
    return path


def test_processor_and_cores(cpu_info: Path, tmp_path: Path) -> None:
    unit = "core" if CORES == 1 else "cores"
    assert describe_machine([], cpu_info) == f"{CORES} {unit} of Fastest CPU @ 9 GHz"
    unnamed = describe_machine([], tmp_path / "none")
    assert unnamed == f"{CORES} {unit} of {os.uname().machine}"
    assert describe_machine([]), "on this machine"


def test_gpus_are_named_once(
    cpu_info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "case $1 in --id=0,2) echo NVIDIA H200; echo NVIDIA H200;; *) exit 9;; esac"
    nvidia_smi(tmp_path, monkeypatch, told)
    assert describe_machine(["0", "2"], cpu_info).startswith("NVIDIA H200, ")
    assert describe_machine(["7"], cpu_info).startswith("GPU, ")


def test_a_gpu_without_the_driver_program(
    cpu_info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_machine(["0"], cpu_info).startswith("GPU, ")
