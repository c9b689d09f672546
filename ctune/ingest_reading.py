"""The pass over an archive that decodes every image once. Never imports torch.

Threads decode, because Pillow decodes outside the interpreter lock and processes would have to copy
every image; the main thread reads the archive and writes. Images are noted in the archive's order.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ctune.archive import ArchiveLimits, Member, MemberError, is_archive, open_archive
from ctune.child import StopRequest
from ctune.errors import ArchiveError
from ctune.events import Progress
from ctune.images import Conversion, ImageError, decode, header_size_px, image_format
from ctune.ingest_report import Seen
from ctune.layouts import kind_of
from ctune.metadata import invalid_metadata, read_metadata
from ctune.schema import PositiveInt, Schema
from ctune.spool import Spool
from ctune.store import StoreWriter

MAX_SIDECAR_BYTES = 64 * 2**10
MAX_BYTES_IN_FLIGHT = 64 * 2**20
IMAGES_PER_THREAD = 4
MAX_THREADS = 16
PROGRESS_S = 1.0
READ_FRACTION = 0.9
"""Part of the whole progress that reading the archive makes."""


class IngestLimits(Schema):
    """What the operator allows."""

    max_unpacked_bytes: PositiveInt = 100 * 2**30
    """Largest sum of an archive's members."""
    max_image_bytes: PositiveInt = 64 * 2**20
    """Largest image file; a larger one is left out."""
    max_image_pixels: PositiveInt = 50_000_000
    """Largest image area; a larger one is left out."""
    max_images: PositiveInt = 10_000_000
    """Most members of an archive."""

    def archive(self) -> ArchiveLimits:
        """Return the limits that concern the archive as a whole."""
        return ArchiveLimits(
            max_unpacked_bytes=self.max_unpacked_bytes, max_members=self.max_images
        )


def num_threads() -> int:
    """Return how many threads decode: one per usable core, at most 16."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


class Pulse:
    """Says how far ingestion is, about once a second, and looks whether it should stop."""

    def __init__(
        self, size_bytes: int, stop: StopRequest, *, say: Callable[[Progress], None] | None
    ) -> None:
        self._size_bytes = max(size_bytes, 1)
        self._say = say
        self._stop = stop
        self._started = self._said = time.monotonic()

    def read(self, num_images: int, position_bytes: int) -> None:
        """Reading the archive has come to a byte of it."""
        self._beat("read", num_images, fraction=READ_FRACTION * position_bytes / self._size_bytes)

    def wrote(self, num_images: int, total: int) -> None:
        """Writing the index has come to an image."""
        part = num_images / max(total, 1)
        fraction = READ_FRACTION + (1 - READ_FRACTION) * part
        self._beat("write", num_images, total_steps=total, fraction=fraction)

    def _beat(self, stage: str, step: int, *, fraction: float, total_steps: int = 0) -> None:
        self._stop.check()
        now = time.monotonic()
        if self._say is None or now - self._said < PROGRESS_S:
            return
        self._said = now
        fraction = min(fraction, 1.0)
        remaining = (now - self._started) * (1 - fraction) / fraction if fraction > 0 else None
        self._say(
            Progress(
                stage=stage,
                step=step,
                total_steps=total_steps,
                fraction=fraction,
                seconds_remaining=remaining,
            )
        )


class _PixelBudget:
    """Lets threads decode at the same time as long as their images are small enough together."""

    def __init__(self, max_pixels: int) -> None:
        self._max = max_pixels
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` more fit; one image always does."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + pixels <= self._max)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


@dataclass(frozen=True)
class _Looked:
    """What decoding found: size and conversions, or why not."""

    size_px: tuple[int, int] = (0, 0)
    conversions: tuple[Conversion, ...] = ()
    fault: ImageError | None = None


@dataclass(frozen=True)
class _Pending:
    """An image on its way through the threads."""

    path: str
    sha256: bytes
    data: bytes
    looked: "Future[_Looked] | None"
    """None: these bytes are in the store already."""


class Reading:
    """One pass over the archive."""

    def __init__(
        self, writer: StoreWriter, spool: Spool, *, limits: IngestLimits, pulse: Pulse
    ) -> None:
        self.seen = Seen()
        self.metadata_paths: list[str] = []
        self._writer = writer
        self._spool = spool
        self._limits = limits
        self._pulse = pulse
        self._pixels = _PixelBudget(limits.max_image_pixels)
        self._pending: deque[_Pending] = deque()
        self._bytes_in_flight = 0

    def read(self, archive: Path, pool: ThreadPoolExecutor) -> None:
        """Take every member in; images end up in the archive's order."""
        for member in open_archive(archive, limits=self._limits.archive()):
            self._pulse.read(self._spool.num_images, member.position_bytes)
            self._take(member, pool)
            while len(self._pending) > IMAGES_PER_THREAD * num_threads() or (
                self._bytes_in_flight > MAX_BYTES_IN_FLIGHT
            ):
                self._store_first()
        while self._pending:
            self._pulse.read(self._spool.num_images, archive.stat().st_size)
            self._store_first()

    def _take(self, member: Member, pool: ThreadPoolExecutor) -> None:
        kind = kind_of(member.path)
        if kind == "junk":
            self.seen.num_junk += 1
        elif member.problem is not None:
            self._leave_out(member.path, member.problem, is_image=kind == "image")
        elif kind == "metadata":
            self._take_metadata(member)
        elif kind == "sidecar":
            self._take_sidecar(member)
        else:
            self._take_image(member, pool, promised=kind == "image")

    def _take_metadata(self, member: Member) -> None:
        self._add_name(member.path, None)
        self.metadata_paths.append(member.path)
        try:
            for row in read_metadata(member.path, member.chunks):
                self._pulse.read(self._spool.num_images, member.position_bytes)
                if not self._spool.add_metadata(member.path, row):
                    reason = f"row {row.line}: a second row for {row.path}"
                    raise invalid_metadata(member.path, reason)
        except MemberError as error:
            raise invalid_metadata(member.path, error.message) from error

    def _take_sidecar(self, member: Member) -> None:
        if member.size_bytes > MAX_SIDECAR_BYTES:
            self.seen.note_other(member.path)
            return
        try:
            content = member.read(MAX_SIDECAR_BYTES)
        except MemberError as error:
            self._leave_out(member.path, (error.error_code, error.message), is_image=False)
            return
        if self._add_name(member.path, hashlib.sha256(content).digest()):
            self._spool.add_sidecar(member.path, content)

    def _take_image(self, member: Member, pool: ThreadPoolExecutor, *, promised: bool) -> None:
        """Read an image; a file that neither its name nor its bytes call one is passed over."""
        try:
            head = next(member.chunks, b"")
            if not promised and not _is_image(head):
                if is_archive(head):
                    detail = "an archive inside the archive"
                    self._leave_out(member.path, ("nested_archive", detail), is_image=False)
                else:
                    self.seen.note_other(member.path)
                return
            member.chunks = chain([head], member.chunks)
            data = member.read(self._limits.max_image_bytes)
        except MemberError as error:
            self._add_name(member.path, None)
            self._leave_out(member.path, (error.error_code, error.message), is_image=True)
            return
        sha256 = hashlib.sha256(data).digest()
        if self._add_name(member.path, sha256):
            known = self._spool.content(sha256) is not None
            looked = None if known else pool.submit(self._look, data)
            self._pending.append(_Pending(member.path, sha256, data, looked))
            self._bytes_in_flight += len(data)

    def _look(self, data: bytes) -> _Looked:
        """Decode an image in full, in a thread."""
        limit = self._limits.max_image_pixels
        try:
            width, height = header_size_px(data, max_pixels=limit)
            with self._pixels.hold(width * height):
                decoded = decode(data, max_pixels=limit)
        except ImageError as error:
            return _Looked(fault=error)
        return _Looked(decoded.image.size, decoded.conversions)

    def _store_first(self) -> None:
        """Wait for the oldest image and note it."""
        item = self._pending.popleft()
        self._bytes_in_flight -= len(item.data)
        content = self._spool.content(item.sha256)
        if content is None and item.looked is not None:
            looked = item.looked.result()
            if looked.fault is not None:
                fault = looked.fault
                self._leave_out(item.path, (fault.error_code, fault.message), is_image=True)
                return
            for kind in looked.conversions:
                self.seen.conversions[kind] += 1
                self.seen.examples.setdefault(f"converted_{kind}", item.path)
            offset = self._writer.put(item.data)
            content = self._spool.add_content(
                item.sha256, offset=offset, length=len(item.data), size_px=looked.size_px
            )
        self._spool.add_image(item.path, content)

    def _leave_out(self, path: str, fault: tuple[str, str], *, is_image: bool) -> None:
        code, detail = fault
        self._spool.add_unreadable(path, code, detail=detail)
        if is_image:
            self._spool.add_image(path, None)

    def _add_name(self, path: str, sha256: bytes | None) -> bool:
        """Whether the name is new; the same file twice is counted.

        Raises:
            ArchiveError: `name_collision`.
        """
        new = self._spool.add_name(path, sha256)
        if new is False:
            raise ArchiveError(
                f"two different files are called {path!r}, up to upper and lower case and accents",
                hint="rename one of them",
                code="name_collision",
            )
        if new is None:
            self.seen.same_names += 1
            self.seen.examples.setdefault("duplicate_names", path)
        return new is True


def _is_image(head: bytes) -> bool:
    try:
        image_format(head)
    except ImageError:
        return False
    return True
