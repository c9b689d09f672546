"""Talk to a ctune service: `Client("http://127.0.0.1:8000")`. Never imports torch.

    client = Client()
    dataset = client.datasets.wait(client.datasets.push("leaves.zip")["id"])
    job = client.jobs.create({"dataset": dataset["id"], "encoder": {...}, "method": {...}})
    for event in client.jobs.watch(job["id"]):
        print(event.kind, event.data)
    vectors = client.embed(client.jobs.wait(job["id"])["result"]["model"], ["new.jpg"])

What comes back is the service's JSON as dictionaries. Errors are the classes of
`ctune.client_http`; connection errors, 429 and 503 are tried again first.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from ctune.client_archive import unpack_model, zip_folder
from ctune.client_http import Http, InvalidRequestError, ServerEvent, UnsuccessfulError
from ctune.schema import JsonObject

Image = bytes | str | PathLike[str]
"""The bytes of an image file, or its path."""
OnProgress = Callable[[int, int], None]
"""Called with (bytes sent, bytes in all)."""

DEFAULT_URL = "http://127.0.0.1:8000"
IMAGES_PER_REQUEST = 64
ESTIMATE_WAIT_S = 30.0
JOB_ENDS = ("succeeded", "failed", "cancelled")
DATASET_ENDS = ("ready", "failed")


class Client:
    """A ctune service; close it, or use it as a context manager."""

    def __init__(self, base_url: str = DEFAULT_URL, *, timeout_s: float = 60.0) -> None:
        self.http = Http(base_url, timeout_s=timeout_s)
        self.datasets = Datasets(self.http)
        self.jobs = Jobs(self.http)
        self.models = Models(self.http)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def methods(self) -> list[JsonObject]:
        """Return the methods with their data needs and the JSON schemas of their configs."""
        return self.http.data_of("/methods")

    def embed(
        self, model: str, images: Sequence[Image], *, normalize: bool = False
    ) -> NDArray[np.float32]:
        """Return the vectors of `images`, (N, embed_dim), in order; as the encoder gives them.

        Raises:
            InvalidRequestError: an image cannot be read; `faults` names its index.
            NotFoundError: there is no such model.
        """
        options = {"model": model, "encoding_format": "base64", "normalize": normalize}
        found = self._in_batches("/embed", images, options)
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in found]
        return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)

    def classify(self, model: str, images: Sequence[Image], *, top_k: int = 5) -> list[JsonObject]:
        """Return per image, in order, `{"predictions": [{"label", "probability"}, …], …}`.

        Raises:
            InvalidRequestError: an image cannot be read, or the model has no classifier.
            NotFoundError: there is no such model.
        """
        return self._in_batches("/classify", images, {"model": model, "top_k": top_k})

    def _in_batches(
        self, path: str, images: Sequence[Image], options: JsonObject
    ) -> list[JsonObject]:
        found: list[JsonObject] = []
        for start in range(0, len(images), IMAGES_PER_REQUEST):
            batch = [data_uri(image) for image in images[start : start + IMAGES_PER_REQUEST]]
            try:
                found += self.http.json("POST", path, json={**options, "input": batch})["data"]
            except InvalidRequestError as error:
                raise _counted_from(start, error) from error
        return found


def _counted_from(start: int, error: InvalidRequestError) -> InvalidRequestError:
    """Return `error` with the indices of all images instead of those of one request."""

    def shifted(pointer: str) -> str:
        head, _, index = pointer.rpartition("/")
        return f"/input/{start + int(index)}" if head == "/input" else pointer

    faults = [{**item, "pointer": shifted(item["pointer"])} for item in error.problem["errors"]]
    return InvalidRequestError(error.status, {**error.problem, "errors": faults})


class Resource:
    """What data sets, jobs and models have in common."""

    path = ""

    def __init__(self, http: Http) -> None:
        self.http = http

    def get(self, id: str) -> JsonObject:
        """Return one of them.

        Raises:
            NotFoundError: there is none with this id.
        """
        return self.http.json("GET", f"{self.path}/{id}")

    def list(self, *, limit: int = 20, after: str | None = None) -> list[JsonObject]:
        """Return up to `limit` of them, newest first, those older than the id `after`."""
        query: dict[str, Any] = {"limit": limit} | ({"after": after} if after else {})
        return self.http.data_of(self.path, query)

    def delete(self, id: str) -> JsonObject:
        """Remove one of them and its files.

        Raises:
            ConflictError: it is in use.
            NotFoundError: there is none with this id.
        """
        return self.http.json("DELETE", f"{self.path}/{id}")

    def _wait(self, id: str, ends: Sequence[str], poll_s: float) -> JsonObject:
        while (found := self.get(id))["status"] not in ends:
            time.sleep(poll_s)
        return found


class Datasets(Resource):
    """Data sets: `client.datasets`."""

    path = "/datasets"

    def push(
        self,
        archive: str | PathLike[str],
        *,
        name: str | None = None,
        options: JsonObject | None = None,
        on_progress: OnProgress | None = None,
    ) -> JsonObject:
        """Upload an archive, or a folder as a zip, in pieces; ingestion then runs in the service.

        Args:
            options: how to read it, for example `{"test_fraction": 0.1}`.

        Raises:
            InvalidRequestError: the service refuses the upload.
        """
        place = Path(archive)
        fields = {"name": name or place.absolute().name, "options": json.dumps(options or {})}
        with zip_folder(place) if place.is_dir() else place.open("rb") as file:
            upload = _Upload(file, on_progress)

            def build() -> httpx.Request:
                upload.seek(0)
                filename = f"{place.name}.zip" if place.is_dir() else place.name
                files = {"file": (filename, upload, "application/octet-stream")}
                return self.http.build("POST", self.path, data=fields, files=files)

            return self.http.answer(self.http.send(build))

    def wait(self, id: str, *, poll_s: float = 0.5) -> JsonObject:
        """Return the data set once it is ready.

        Raises:
            UnsuccessfulError: it cannot be used; the message says why.
        """
        dataset = self._wait(id, DATASET_ENDS, poll_s)
        if dataset["status"] != "ready":
            raise UnsuccessfulError("data set", dataset)
        return dataset


class Jobs(Resource):
    """Jobs: `client.jobs`."""

    path = "/jobs"

    def create(self, job: JsonObject) -> JsonObject:
        """Start a job: `{"dataset": …, "encoder": {…}, "method": {…}, …}`.

        Raises:
            InvalidRequestError: `faults` lists everything that is wrong with it, with pointers.
        """
        return self.http.json("POST", self.path, json=job)

    def estimate(self, job: JsonObject, *, wait_s: float = 0.0) -> JsonObject:
        """Return what a job would take: steps, memory, disk, time; no job is made.

        Args:
            wait_s: how long to wait for a worker to measure time and memory; while they are null,
                `reason` says why.

        Raises:
            InvalidRequestError: as `create`.
        """
        until = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, until - time.monotonic())
            query = {"wait_s": min(left_s, ESTIMATE_WAIT_S)}
            found = self.http.json("POST", f"{self.path}/estimate", json=job, params=query)
            if found["retry_after_s"] is None or left_s <= ESTIMATE_WAIT_S:
                return found

    def cancel(self, id: str) -> JsonObject:
        """Abort a job; its status becomes `cancelled` when a running one has stopped.

        Raises:
            ConflictError: it has ended already.
        """
        return self.http.json("POST", f"{self.path}/{id}/cancel")

    def stop(self, id: str) -> JsonObject:
        """Let a running job finish early: its stage ends, then it is evaluated and exported.

        Raises:
            ConflictError: it does not run.
        """
        return self.http.json("POST", f"{self.path}/{id}/stop")

    def pause(self, id: str) -> JsonObject:
        """Keep a job from running; its status becomes `paused` when a running one has stopped.

        Raises:
            ConflictError: it has ended, or is being cancelled.
        """
        return self.http.json("POST", f"{self.path}/{id}/pause")

    def resume(self, id: str) -> JsonObject:
        """Queue a paused job again; it goes on from its last checkpoint.

        Raises:
            ConflictError: nobody has paused it.
        """
        return self.http.json("POST", f"{self.path}/{id}/resume")

    def watch(self, id: str, *, last_event_id: str | None = None) -> Iterator[ServerEvent]:
        """Yield what happens to a job until it has ended, also across lost connections."""
        yield from self.http.events(f"{self.path}/{id}/events", last_event_id)

    def wait(self, id: str, *, poll_s: float = 1.0) -> JsonObject:
        """Return the job once it has succeeded; a paused one is waited for.

        Raises:
            UnsuccessfulError: it failed or was cancelled; the message says why.
        """
        job = self._wait(id, JOB_ENDS, poll_s)
        if job["status"] != "succeeded":
            raise UnsuccessfulError("job", job)
        return job

    def metrics(self, id: str, **query: Any) -> JsonObject:
        """Return the job's series; `query`: name, stage, after_step, max_points."""
        return self.http.json("GET", f"{self.path}/{id}/metrics", params=query)

    def report(self, id: str) -> JsonObject:
        """Return the report: scores before and after, last metrics, warnings, durations."""
        return self.http.json("GET", f"{self.path}/{id}/report")

    def report_page(self, id: str) -> str:
        """Return the report as a page of HTML that is one file."""
        path = f"{self.path}/{id}/report"
        return self.http.request("GET", path, params={"format": "html"}).text

    def compare(self, ids: Sequence[str]) -> JsonObject:
        """Return one table over 2 to 50 jobs: what they were, their scores, means over seeds.

        Raises:
            NotFoundError: some do not exist; `faults` names all of them.
        """
        return self.http.json("GET", f"{self.path}/compare", params={"ids": ",".join(ids)})

    def logs(self, id: str) -> str:
        """Return what the training process has printed."""
        return self.http.request("GET", f"{self.path}/{id}/logs").text


class Models(Resource):
    """Models: `client.models`."""

    path = "/models"

    def pull(self, id: str, folder: str | PathLike[str]) -> Path:
        """Download a model into `folder`, which timm loads as `local-dir:FOLDER`.

        Raises:
            FileExistsError: `folder` exists and is not empty.
            DataError: what arrived is not what the model says of its files.
        """
        place = Path(folder)
        if place.exists() and any(place.iterdir()):
            raise FileExistsError(f"{place} exists and is not empty; choose a new folder")
        with self.http.download(f"{self.path}/{id}/download") as archive:
            unpack_model(archive, place)
        return place


class _Upload(io.RawIOBase):
    """A file that is read in pieces and tells how far it is; httpx asks for its length."""

    def __init__(self, file: BinaryIO, on_progress: OnProgress | None) -> None:
        self._file = file
        self._on_progress = on_progress
        self._total = file.seek(0, io.SEEK_END)

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        if self._on_progress and piece:
            self._on_progress(self._file.tell(), self._total)
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


MAGIC = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}


def data_uri(image: Image) -> str:
    """Return an image file as `data:image/png;base64,…`."""
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    kinds = (kind for magic, kind in MAGIC.items() if data.startswith(magic))
    kind = next(kinds, "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
