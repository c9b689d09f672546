"""A scratch database that holds what ingestion knows of each image until the last one is read.

Labels need all class names, splits need all images of a class: neither can be said while the
archive streams by. Ten million images do not fit in Python objects either, so they wait here, in a
file beside the store that is removed at the end. Never imports torch.
"""

import errno
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctune.archive import collision_key
from ctune.layouts import sample_key
from ctune.manifest import SPLITS, Split
from ctune.metadata import MetadataRow, Values
from ctune.schema import JsonObject

TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -32768;
CREATE TABLE name (key BLOB PRIMARY KEY, sha BLOB) WITHOUT ROWID;
CREATE TABLE content (id INTEGER PRIMARY KEY, sha BLOB UNIQUE, offset, length, width, height);
CREATE TABLE image (n INTEGER PRIMARY KEY, path TEXT, key BLOB, sample BLOB, content INTEGER);
CREATE TABLE unreadable (path TEXT, code TEXT, detail TEXT);
CREATE TABLE metadata (key BLOB PRIMARY KEY, source, line, path, label, split, columns)
    WITHOUT ROWID;
CREATE TABLE sidecar (sample BLOB, suffix TEXT, path TEXT, body BLOB, PRIMARY KEY (sample, suffix))
    WITHOUT ROWID;
CREATE TABLE placed (n INTEGER PRIMARY KEY, content INTEGER, label TEXT, split INTEGER, columns);
"""
SELECT_IMAGES = """
SELECT i.n, i.content, i.path, m.key, m.label, m.split, m.columns,
       c.path, c.body, t.path, t.body, j.path, j.body
FROM image i LEFT JOIN metadata m ON m.key = i.key
LEFT JOIN sidecar c ON c.sample = i.sample AND c.suffix = 'cls'
LEFT JOIN sidecar t ON t.sample = i.sample AND t.suffix = 'txt'
LEFT JOIN sidecar j ON j.sample = i.sample AND j.suffix = 'json'
ORDER BY i.n
"""
DRAW_HELDOUT = """
CREATE TABLE held AS SELECT content FROM (
    SELECT content, ROW_NUMBER() OVER (PARTITION BY label ORDER BY sha) AS place,
           COUNT(*) OVER (PARTITION BY label) AS total
    FROM (SELECT p.content, MIN(p.label) AS label, c.sha
          FROM placed p JOIN content c ON c.id = p.content GROUP BY p.content)
) WHERE place <= MIN(total - 1, MAX(1, ROUND(total * ?)))
"""
SELECT_ROWS = """
SELECT i.path, c.sha, c.offset, c.length, c.width, c.height, p.label, p.split, p.columns
FROM placed p JOIN image i ON i.n = p.n JOIN content c ON c.id = p.content ORDER BY p.n
"""


@dataclass(frozen=True)
class Spooled:
    """One image with what lies beside it."""

    path: str
    metadata: Values | None
    """Its row in a metadata file."""
    sidecars: list[tuple[str, bytes]]
    """(path, content) of its sidecar files: label, text, object."""


@dataclass(frozen=True)
class PlacedRow:
    """One image as the store takes it."""

    path: str
    sha256: str
    offset: int
    length: int
    size_px: tuple[int, int]
    label: str | None
    split: Split
    columns: JsonObject


Place = Callable[[Spooled], Values]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@contextmanager
def open_spool(path: Path) -> Iterator["Spool"]:
    """Open a fresh spool and remove it at the end; a full disk is an `OSError` as elsewhere."""
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path)
    try:
        database.executescript(TABLES)
        yield Spool(database)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, str(error), str(path)) from error
        raise
    finally:
        database.close()
        path.unlink(missing_ok=True)


class Spool:
    """What is known of the images so far."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.num_images = 0

    def add_name(self, path: str, sha256: bytes | None) -> bool | None:
        """Note a file's name: True when new, None when there with these bytes, else False.

        Names count as equal where they differ in case or Unicode form only.
        """
        key = _hash(collision_key(path))
        done = self._database.execute("INSERT OR IGNORE INTO name VALUES (?, ?)", (key, sha256))
        if done.rowcount:
            return True
        (known,) = self._one("SELECT sha FROM name WHERE key = ?", key)
        return None if known is not None and known == sha256 else False

    def content(self, sha256: bytes) -> int | None:
        """Return the number of a known content."""
        found = self._database.execute("SELECT id FROM content WHERE sha = ?", (sha256,)).fetchone()
        return found[0] if found else None

    def add_content(
        self, sha256: bytes, *, offset: int, length: int, size_px: tuple[int, int]
    ) -> int:
        """Note a new content and return its number."""
        values = (sha256, offset, length, *size_px)
        done = self._database.execute(
            "INSERT INTO content (sha, offset, length, width, height) VALUES (?, ?, ?, ?, ?)",
            values,
        )
        return int(done.lastrowid or 0)

    def add_image(self, path: str, content: int | None) -> None:
        """Note an image, readable or (None) not."""
        keys = _hash(collision_key(path)), _hash(sample_key(path))
        values = (path, *keys, content)
        self._database.execute(
            "INSERT INTO image (path, key, sample, content) VALUES (?, ?, ?, ?)", values
        )
        self.num_images += content is not None

    def add_unreadable(self, path: str, code: str, *, detail: str) -> None:
        """Note a file that is left out, and why."""
        self._database.execute("INSERT INTO unreadable VALUES (?, ?, ?)", (path, code, detail))

    def add_metadata(self, source: str, row: MetadataRow) -> bool:
        """Note a row of a metadata file; False when its image has one already."""
        values = (
            _hash(collision_key(row.path)),
            source,
            row.line,
            row.path,
            row.values.label,
            row.values.split,
            json.dumps(row.values.columns, ensure_ascii=False),
        )
        insert = "INSERT OR IGNORE INTO metadata VALUES (?, ?, ?, ?, ?, ?, ?)"
        return bool(self._database.execute(insert, values).rowcount)

    def add_sidecar(self, path: str, content: bytes) -> None:
        """Note a file that belongs to the image of the same name, if there is one."""
        values = (_hash(sample_key(path)), path.rpartition(".")[2].lower(), path, content)
        self._database.execute("INSERT OR IGNORE INTO sidecar VALUES (?, ?, ?, ?)", values)

    def paths(self) -> Iterator[str]:
        """Yield the path of every image, readable or not."""
        for (path,) in self.rows("SELECT path FROM image ORDER BY n"):
            yield path

    def place(self, place: Place) -> None:
        """Give each image the label, split and columns that `place` says."""
        self._database.executemany("INSERT INTO placed VALUES (?, ?, ?, ?, ?)", self._placed(place))

    def _placed(self, place: Place) -> Iterator[tuple[object, ...]]:
        for n, content, path, key, label, split, columns, *beside in self.rows(SELECT_IMAGES):
            metadata = Values(label, split, json.loads(columns)) if key is not None else None
            pairs = zip(beside[::2], beside[1::2], strict=True)
            sidecars = [(name, body) for name, body in pairs if name is not None]
            values = place(Spooled(path, metadata, sidecars))
            split_number = None if values.split is None else SPLITS.index(values.split)
            text = json.dumps(values.columns, ensure_ascii=False) if values.columns else None
            yield n, content, values.label, split_number, text

    def drop_unreadable(self) -> None:
        """Forget the images without content, once no class depends on them."""
        self._database.execute("DELETE FROM placed WHERE content IS NULL")

    def fill_split(self, split: Split) -> int:
        """Put the images without a split into one; return how many."""
        sql = "UPDATE placed SET split = ? WHERE split IS NULL"
        return self._database.execute(sql, (SPLITS.index(split),)).rowcount

    def draw_split(self, test_fraction: float) -> None:
        """Hold out a part of each class, by sha256, so that equal bytes fall on one side.

        A content in several classes is drawn in the first of them by name. At least one image of a
        class is held out and at least one is not, where it has two different ones.
        """
        self._database.execute(DRAW_HELDOUT, (test_fraction,))
        self._database.execute(
            "UPDATE placed SET split = CASE WHEN content IN held THEN ? ELSE ? END",
            (SPLITS.index("test"), SPLITS.index("train")),
        )

    def placed(self) -> Iterator[PlacedRow]:
        """Yield the readable images in the archive's order."""
        for path, sha, offset, length, width, height, label, split, columns in self.rows(
            SELECT_ROWS
        ):
            yield PlacedRow(
                path=path,
                sha256=sha.hex(),
                offset=offset,
                length=length,
                size_px=(width, height),
                label=label,
                split=SPLITS[split],
                columns=json.loads(columns) if columns else {},
            )

    def rows(self, sql: str, *values: object) -> Iterator[Any]:
        """Yield the rows of a query."""
        return self._database.execute(sql, values)

    def count(self, sql: str, *values: object) -> int:
        """Return the one number that a query gives."""
        return int(self._one(sql, *values)[0] or 0)

    def _one(self, sql: str, *values: object) -> Any:
        return self._database.execute(sql, values).fetchone()
