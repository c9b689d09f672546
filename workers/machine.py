"""What kind of machine a worker is: estimates made on one hold for others of its kind."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from workers.gpus import NVIDIA_SMI_TIMEOUT_S

CPU_INFO = Path("/proc/cpuinfo")
LONGEST = 256


def describe_machine(gpus: Sequence[str], cpu_info: Path = CPU_INFO) -> str:
    """Return GPU, usable cores and processor in words: `NVIDIA H200, 16 cores of AMD EPYC 9554`.

    Args:
        gpus: this worker's GPUs, as `CUDA_VISIBLE_DEVICES` takes them.
        cpu_info: the kernel's list of processors.
    """
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} {'core' if cores == 1 else 'cores'} of {_processor(cpu_info)}"
    return ", ".join([*_gpu_names(gpus), machine])[:LONGEST]


def _processor(cpu_info: Path) -> str:
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return os.uname().machine


def _gpu_names(gpus: Sequence[str]) -> list[str]:
    """Return the distinct names of the GPUs, without loading CUDA."""
    if not gpus:
        return []
    program = shutil.which("nvidia-smi")
    if program is None:
        return ["GPU"]
    asked = [program, f"--id={','.join(gpus)}", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return ["GPU"]
    names = {line.strip() for line in said.stdout.splitlines() if line.strip()}
    return sorted(names) if said.returncode == 0 and names else ["GPU"]
