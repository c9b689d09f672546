"""The scratch database of ingestion."""

import errno
import sqlite3
from pathlib import Path

import pytest

from ctune.spool import open_spool


def test_a_full_disk_is_said_as_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, open_spool(tmp_path / "spool") as spool:
        spool.rows("PRAGMA max_page_count = 30")
        for n in range(10_000):
            spool.add_name(f"{n}", None)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "spool").exists()
    with pytest.raises(sqlite3.OperationalError), open_spool(tmp_path / "spool") as spool:
        spool.rows("not SQL")
