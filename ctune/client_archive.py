"""Archives on the client's side: a folder becomes an upload, a download becomes a model directory.

Never imports torch.
"""

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ctune.errors import DataError


@contextmanager
def zip_folder(folder: Path, *, beside: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary zip of the files below `folder`; images are stored, not packed again.

    The same files give the same bytes. `beside`: directory of the zip, else the system's own.
    """
    with tempfile.NamedTemporaryFile(suffix=".zip", dir=beside) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.samefile(file.name):
                    _add(archive, path, path.relative_to(folder).as_posix())
        file.flush()
        file.seek(0)
        yield file  # type: ignore[misc]  # a BinaryIO by all it does


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    """Store a file under a constant date: a copy of the folder gives the same bytes."""
    info = zipfile.ZipInfo(name)  # dated 1980, the earliest that a zip can say
    info.file_size = path.stat().st_size
    with path.open("rb") as source, archive.open(info, "w") as target:
        shutil.copyfileobj(source, target)


def unpack_model(archive: BinaryIO, folder: Path) -> None:
    """Unpack a downloaded zip into `folder` and compare it with the sums in its `model.json`.

    Raises:
        DataError: a name leads out of `folder`, or a file is damaged; `folder` is then not made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _unpack(archive, temporary)
        _check_sums(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _unpack(archive: BinaryIO, folder: Path) -> None:
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise DataError(f"the download is not a zip: {error}", hint="try again") from error
    with opened:
        for member in opened.infolist():
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
                raise DataError(f"the download holds the unsafe name {member.filename!r}")
            place = folder / name
            if member.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, place.open("wb") as target:
                shutil.copyfileobj(source, target)


def _check_sums(folder: Path) -> None:
    description = folder / "model.json"
    if not description.exists():
        raise DataError("the download has no model.json", hint="try again")
    sums = json.loads(description.read_text(encoding="utf-8")).get("files", {})
    for name, wanted in sums.items():
        place = folder / name
        if not place.is_file():
            raise DataError(f"the download has no {name}", hint="try again")
        with place.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise DataError(f"{name} arrived damaged: sha256 {found}, not {wanted}")
