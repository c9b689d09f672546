"""Archives that are wrong or meant to harm, over HTTP: each gets a clear answer and leaves nothing.

The service stays ready, and on its disk there are only the stores of the data sets that are ready.
"""

import os
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from ctune.client import Client
from ctune.client_http import InvalidRequestError, UnsuccessfulError
from ctune.ingest import IngestFile
from ctune.schema import JsonObject
from tests.ctune.archives import pack_zip
from tests.e2e.running import Running, command_line, until
from tests.squares import noisy_square, tiny_config, write_archive

pytestmark = pytest.mark.timeout(600)

PNG = noisy_square(0, np.random.default_rng(0))


def png_of_header(side_px: int) -> bytes:
    """Return a PNG whose header promises a huge square and that has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def pack_link(path: Path) -> None:
    """Write a tar with a symbolic link to a file of the machine."""
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("red/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def squares(number: int, *classes: str) -> dict[str, bytes]:
    """Return `number` different images per class."""
    rng = np.random.default_rng(0)
    return {f"{name}/{n}.png": noisy_square(0, rng) for name in classes for n in range(number)}


@dataclass(frozen=True)
class Case:
    """An archive, and what is to be said of it."""

    name: str
    pack: Callable[[Path], object]
    refused: str = ""
    """Code of the failure; none for an archive that becomes a data set."""
    said: str = ""
    """What the message names."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(path, code) of the images that are left out."""
    warned: tuple[str, ...] = ()
    """Codes among the warnings of the report."""
    job_fault: tuple[str, str] | None = None
    """(pointer, code) of the refusal of a LaCViT job on it."""


CASES = [
    Case("no archive", lambda p: p.write_bytes(b"hello"), "not_an_archive", "hello"),
    Case("nothing in it", lambda p: pack_zip(p, {}), "empty_archive", "no file"),
    Case(
        "leads out",
        lambda p: pack_zip(p, {"red/1.png": PNG, "../../evil.png": PNG}),
        "unsafe_path",
        "../../evil.png",
    ),
    Case("link", pack_link, "unsafe_member", "red/link.png"),
    Case("bomb", lambda p: pack_zip(p, {"red/1.png": bytes(50_000_000)}), "archive_bomb", "100"),
    Case("only zero bytes", lambda p: pack_zip(p, {"red/1.png": b""}), "no_images", "red/1.png"),
    Case(
        "huge image",
        lambda p: write_archive(p, others={"train/red/huge.png": png_of_header(40_000)}),
        left_out=(("train/red/huge.png", "image_too_large"),),
    ),
    Case(
        "damaged images",
        lambda p: write_archive(
            p, others={"train/red/cut.png": PNG[: len(PNG) // 2], "train/red/empty.png": b""}
        ),
        left_out=(("train/red/cut.png", "corrupt"), ("train/red/empty.png", "empty_file")),
    ),
    Case(
        "one class",
        lambda p: pack_zip(p, squares(20, "red")),
        warned=("one_class",),
        job_fault=("/method/name", "labels_needed"),
    ),
    Case(
        "one image per class",
        lambda p: pack_zip(p, squares(1, "blue", "green", "red")),
        warned=("class_with_one_image",),
        job_fault=("/method/contrastive/batch_size", "batch_larger_than_data"),
    ),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("hostile") / "data")
    try:
        yield made.wait_ready()
        assert made.stop() == 0, made.log()
        assert "Traceback" not in made.log(), made.log()
    finally:
        made.discard()


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[Client]:
    with Client(service.url) as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_clear_answer_and_nothing_left(
    service: Running, client: Client, tmp_path: Path, case: Case
) -> None:
    path = tmp_path / "archive"
    case.pack(path)
    dataset = client.datasets.push(path)["id"]
    if case.refused:
        with pytest.raises(UnsuccessfulError):
            client.datasets.wait(dataset)
        check_failure(client.datasets.get(dataset), case)
        fault = ("/dataset", "dataset_failed")
        assert refusal_of_job(client, dataset) == fault
    else:
        check_report(client.datasets.wait(dataset), case)
        if case.job_fault is not None:
            assert refusal_of_job(client, dataset) == case.job_fault
    check_service(service, client)


def test_a_job_on_a_data_set_that_is_still_being_read(
    service: Running, client: Client, tmp_path: Path
) -> None:
    archive = write_archive(tmp_path / "squares.zip", train_per_class=600)
    dataset = client.datasets.push(archive)["id"]
    until(lambda: bool(ingestions(service, dataset)), 30, service.log)
    (child,) = ingestions(service, dataset)
    os.kill(child, signal.SIGSTOP)  # so that it stays as it is
    try:
        assert client.datasets.get(dataset)["status"] == "processing"
        assert refusal_of_job(client, dataset) == ("/dataset", "dataset_not_ready")
    finally:
        os.kill(child, signal.SIGCONT)
    client.datasets.wait(dataset)
    check_service(service, client)


def ingestions(service: Running, dataset: str) -> list[int]:
    """Return the process id of a data set's ingestion, if it runs."""
    return [
        pid
        for pid in service.descendants()
        if "ctune.ingest" in (words := command_line(pid)) and any(dataset in word for word in words)
    ]


def check_failure(dataset: JsonObject, case: Case) -> None:
    """Check that a failed data set says what is wrong, where, and what to do."""
    error = dataset["error"]
    assert (dataset["status"], error["code"]) == ("failed", case.refused)
    assert (error["fault"], error["retryable"]) == ("user", False)
    assert case.said in error["message"]
    assert error["hint"]
    assert (dataset["summary"], dataset["report"]) == (None, None)


def check_report(dataset: JsonObject, case: Case) -> None:
    """Check what a data set that is ready says of its files."""
    report = dataset["report"]
    assert {(item["path"], item["code"]) for item in report["unreadable"]} == set(case.left_out)
    assert report["num_unreadable"] == len(case.left_out)
    assert set(case.warned) <= {item["code"] for item in report["warnings"]}
    assert all(item["detail"] for item in report["unreadable"] + report["warnings"])
    assert dataset["summary"]["num_images"] > 0


def refusal_of_job(client: Client, dataset: str) -> tuple[str, str]:
    """Return pointer and code of the one fault for which a LaCViT job is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        client.jobs.create(tiny_config(dataset=dataset))
    assert caught.value.status == 422
    (fault,) = caught.value.faults
    assert len(fault.detail) > 20 and fault.detail.endswith(".")
    return fault.pointer, fault.code


def check_service(service: Running, client: Client) -> None:
    """Check that the service is ready and its disk holds the stores of ready data sets alone."""
    assert httpx.get(f"{service.url}/readyz").status_code == 200
    expected = {
        IngestFile(
            archive=Path("any"), archive_sha256=found["archive_sha256"], options=found["options"]
        ).store_key
        for found in client.datasets.list(limit=100)
        if found["status"] == "ready"
    }
    wanted = {"uploads": set[str](), "runs": set[str](), "stores": expected, "jobs": set[str]()}

    def on_disk() -> dict[str, set[str]]:
        folders = {name: service.data_dir / name for name in wanted}
        return {name: {path.name for path in at.iterdir()} for name, at in folders.items()}

    until(lambda: on_disk() == wanted, 10, lambda: f"{on_disk()}\n{service.log()}")
    assert "evil.png" not in {path.name for path in service.data_dir.parent.rglob("*")}
