"""What the embedding process does at its limits: full queue, large images, damaged models."""

import io
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.service.embeddings.conftest import (
    EmbedServer,
    as_png,
    data_uri,
    embed,
    export_tiny,
    picture,
    problem,
    running,
    wait_until,
)


@pytest.fixture(scope="module")
def small_queue(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbedServer]:
    """A server in which 40 images may wait."""
    data_dir = tmp_path_factory.mktemp("small_queue")
    shutil.copytree(exported, data_dir / "models")
    with running(data_dir, CTUNE_MAX_PENDING_IMAGES="40") as found:
        embed(found, [picture(1)])
        yield found


def slow_files(count: int) -> list[tuple[str, tuple[str, bytes]]]:
    """Images that take long to decode: 36 megapixels in 100 kB."""
    buffer = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(buffer, "PNG")
    return [("input", ("a.png", buffer.getvalue()))] * count


def pending(server: EmbedServer) -> int:
    found: int = server.http.get("/readyz").json()["detail"]["pending_images"]
    return found


def test_a_full_queue_says_when_to_come_back(small_queue: EmbedServer) -> None:
    http = small_queue.http
    files = slow_files(4) + [("input", ("b.png", as_png(picture(2))))] * 36
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(http.post, "/embed", data={"model": "mdl_a"}, files=files)
        wait_until(lambda: pending(small_queue) == 40)
        body = {"model": "mdl_a", "input": [data_uri(picture(1))]}
        refused = http.post("/embed", json=body)
        assert problem(refused, 429)["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert len(slow.result().json()["data"]) == 40
    assert pending(small_queue) == 0
    assert embed(small_queue, [picture(1)]).shape == (1, 24)


def test_a_client_that_leaves_frees_its_places(small_queue: EmbedServer) -> None:
    request = small_queue.http.build_request(
        "POST", "/embed", data={"model": "mdl_a"}, files=slow_files(40)
    )
    content = request.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", small_queue.port)) as client:
        client.sendall(f"POST /embed HTTP/1.1\r\n{head}\r\n".encode() + content)
        wait_until(lambda: pending(small_queue) == 40)
    wait_until(lambda: pending(small_queue) == 0, timeout_s=5)
    assert embed(small_queue, [picture(1)]).shape == (1, 24)


@pytest.fixture(scope="module")
def strict(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbedServer]:
    """A server with low limits whose `mdl_a` has damaged weights."""
    data_dir = tmp_path_factory.mktemp("strict")
    shutil.copytree(exported, data_dir / "models")
    path = data_dir / "models/mdl_a/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with running(data_dir, CTUNE_MAX_IMAGE_PIXELS="600", CTUNE_MAX_IMAGE_BYTES="1500") as found:
        yield found


def test_limits_of_image_size(strict: EmbedServer) -> None:
    images = [Image.new("RGB", (10, 10)), picture(1), Image.new("RGB", (25, 25))]
    body = {"model": "mdl_b", "input": [data_uri(image) for image in images]}
    faults = problem(strict.http.post("/embed", json=body), 422)["errors"]
    assert [(fault["pointer"], fault["code"]) for fault in faults] == [
        ("/input/1", "image_too_large"),
        ("/input/2", "image_too_large"),
    ]


def test_damaged_weights_are_found_on_load(strict: EmbedServer) -> None:
    body = {"model": "mdl_a", "input": [data_uri(picture(1, 10, 10))]}
    answer = strict.http.post("/embed", json=body)
    found = problem(answer, 500)
    assert found["error"]["code"] == "model_unusable"
    assert "model.safetensors has sha256" in found["detail"]
    assert str(strict.data_dir) not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert embed(strict, [picture(1, 10, 10)], model="mdl_b").shape == (1, 24)


def test_deleted_and_replaced_models(strict: EmbedServer) -> None:
    image = picture(1, 10, 10)
    folder = strict.data_dir / "models/mdl_c"
    shutil.copytree(strict.data_dir / "models/mdl_b", folder)
    first = embed(strict, [image], model="mdl_c")
    export_tiny(folder, seed=5, classes=None)
    assert np.abs(embed(strict, [image], model="mdl_c") - first).max() > 0.01
    shutil.rmtree(folder)
    body = {"model": "mdl_c", "input": [data_uri(image)]}
    problem(strict.http.post("/embed", json=body), 404)
    assert "mdl_c" not in strict.http.get("/readyz").json()["detail"]["models"]
