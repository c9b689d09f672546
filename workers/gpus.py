"""The GPUs of this worker. A job takes all it needs at once, and is claimed only if it can."""

import os
import shutil
import subprocess
from pathlib import Path

from service.settings import Settings

NVIDIA_SMI_TIMEOUT_S = 20


class GpuPool:
    """Names of this worker's GPUs, as `CUDA_VISIBLE_DEVICES` takes them; for one thread."""

    def __init__(self, names: list[str]) -> None:
        self.total = len(names)
        self._free = list(names)

    @property
    def free(self) -> int:
        """How many are not taken."""
        return len(self._free)

    def needed(self, asked: int | None) -> int:
        """Return how many a job takes; none asked for: one where the worker has one."""
        return min(1, self.total) if asked is None else asked

    def take(self, count: int) -> tuple[str, ...]:
        """Take `count` GPUs, which must be free."""
        if count > len(self._free):
            raise ValueError(f"{count} GPUs asked for, {len(self._free)} free")
        taken, self._free = self._free[:count], self._free[count:]
        return tuple(taken)

    def give_back(self, names: tuple[str, ...]) -> None:
        """Return GPUs that were taken."""
        self._free += names


def find_gpus(settings: Settings) -> list[str]:
    """Return the names of this worker's GPUs, without loading CUDA.

    `auto` keeps to the worker's own `CUDA_VISIBLE_DEVICES`, then asks `nvidia-smi`, then counts
    device files.

    Raises:
        ValueError: `settings.gpus` is neither `auto`, `none` nor a list of indices.
    """
    if settings.gpus == "none":
        return []
    if settings.gpus != "auto":
        names = [name.strip() for name in settings.gpus.split(",")]
        if not all(name.isdigit() for name in names) or len(set(names)) != len(names):
            raise ValueError(
                f"CTUNE_GPUS is {settings.gpus!r}. Use auto, none, or indices such as 0,1."
            )
        return names
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(_count_gpus(Path("/dev")))]


def _count_gpus(devices: Path) -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return len(list(devices.glob("nvidia[0-9]*")))
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return len(list(devices.glob("nvidia[0-9]*")))
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
