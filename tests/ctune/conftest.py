"""The squares as an archive and as a packed store, made once per session."""

from pathlib import Path

import pytest

from ctune.ingest import ingest
from tests.squares import write_archive


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "squares.zip")


@pytest.fixture(scope="session")
def store(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "squares"
    ingest(archive, path)
    return path
