"""Small exported models and a real embedding server."""

import base64
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ctune.backbones import build_encoder
from ctune.encoders import TimmEncoder
from ctune.export import export_model

OPTIONS = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
START_S = 60

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class EmbedServer:
    """An embedding process of its own, and its data directory."""

    http: httpx.Client
    data_dir: Path
    port: int
    pid: int


def picture(seed: int, width_px: int = 20, height_px: int = 30) -> Image.Image:
    """Return noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    """Return a PNG as JSON bodies carry it."""
    return "data:image/png;base64," + base64.b64encode(as_png(image)).decode()


def embed(server: EmbedServer, images: list[Image.Image], **fields: Any) -> Vectors:
    """Return the vectors that the server answers, by default those of `mdl_a`."""
    body = {"model": "mdl_a", "input": [data_uri(image) for image in images], **fields}
    answer = server.http.post("/embed", json=body)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Return the body of an answer that must be a problem with this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status and body["detail"] and body["error"]["message"]
    return body


def export_tiny(path: Path, *, seed: int, classes: list[str] | None) -> None:
    """Export a two-block ViT, with a classifier if there are classes, else with another head."""
    torch.manual_seed(seed)
    config = TimmEncoder(
        name="vit_tiny_patch16_224", pretrained=False, image_size_px=16, options=OPTIONS
    )
    export_model(
        build_encoder(config, pool="mean", encoder_dir=None),
        path,
        provenance={},
        evaluation={},
        reference_images=[picture(0), picture(1)],
        classes=classes,
        heads={"classifier": nn.Linear(24, len(classes))}
        if classes
        else {"nnclr_head": nn.BatchNorm1d(24)},
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model directories `mdl_a` (three classes) and `mdl_b` (none)."""
    models = tmp_path_factory.mktemp("exported")
    export_tiny(models / "mdl_a", seed=0, classes=["x", "y", "z"])
    export_tiny(models / "mdl_b", seed=1, classes=None)
    return models


@pytest.fixture
def data_dir(exported: Path, tmp_path: Path) -> Path:
    """A data directory of its own with both models."""
    shutil.copytree(exported, tmp_path / "data/models")
    return tmp_path / "data"


@contextmanager
def running(data_dir: Path, **settings: str) -> Iterator[EmbedServer]:
    """Run the embedding process with warnings as errors; it must end cleanly."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    environment = os.environ | {"CTUNE_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-W", "error", "-m", "service.embeddings.app", "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
            _wait_until_ready(http, process)
            yield EmbedServer(http, data_dir, port, process.pid)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM  # uvicorn drains, then dies of the signal
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until(met: Callable[[], bool], timeout_s: float = 30) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbedServer]:
    """One server for the tests of a module, with both models."""
    data_dir = tmp_path_factory.mktemp("served")
    shutil.copytree(exported, data_dir / "models")
    with running(data_dir, CTUNE_MAX_BATCH_IMAGES="4", CTUNE_MAX_PENDING_IMAGES="64") as found:
        yield found


def _wait_until_ready(http: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, "the embedding process ended"
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the embedding process does not start"
        time.sleep(0.05)
