"""Folders become archives whose bytes depend on names and contents alone."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from ctune.client_archive import zip_folder
from ctune.errors import ConfigError
from ctune.local import open_data
from ctune.rundir import RunDir


def packed(folder: Path, beside: Path | None = None) -> bytes:
    with zip_folder(folder, beside=beside) as file:
        return file.read()


def test_equal_files_give_equal_bytes_whatever_their_dates(tmp_path: Path) -> None:
    (tmp_path / "one" / "red").mkdir(parents=True)
    (tmp_path / "one" / "red" / "a.png").write_bytes(b"a")
    os.utime(tmp_path / "one" / "red" / "a.png", (0, 0))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    assert packed(tmp_path / "one") == packed(tmp_path / "two")


def test_the_zip_does_not_hold_itself(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    with zip_folder(tmp_path, beside=tmp_path) as file, zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["a.png"]


def test_a_run_directory_inside_the_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inside the images"):
        open_data(tmp_path, RunDir(tmp_path / "out"))
