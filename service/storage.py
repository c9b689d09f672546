"""Where files live below the data directory: the only file that knows these names.

DATA_DIR/
    ctune.sqlite                 the embedded database
    uploads/<ds_id>              an archive; half-written ones end in `.part`
    runs/<ds_id>/a<attempt>/     run directory of an ingestion
    calibrations/<cal_id>/a<attempt>/  run directory of a calibration
    stores/<content key>/        packed data sets, shared by data sets with equal bytes
    jobs/<job_id>/a<attempt>/    run directory of a training attempt
    models/<mdl_id>/             exported models
"""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ctune.rundir import RunDir, fsync_directory

FOLDERS = ("uploads", "runs", "calibrations", "stores", "jobs", "models")


class Storage:
    """Paths and moves below one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir.absolute()

    def create(self) -> "Storage":
        """Make the folders; existing ones stay as they are."""
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        return self

    def absolute(self, relative: str) -> Path:
        """Return the path of a name stored in the database."""
        return self.root / relative

    def relative(self, path: Path) -> str:
        """Return the name under which the database keeps `path`."""
        return path.relative_to(self.root).as_posix()

    def upload(self, dataset_id: str) -> Path:
        """Return where an archive lies until it is ingested."""
        return self.root / "uploads" / dataset_id

    def ingest_run(self, dataset_id: str, attempt: int) -> RunDir:
        """Return the run directory of one ingestion attempt."""
        return RunDir(self.root / "runs" / dataset_id / f"a{attempt}")

    def calibration_run(self, calibration_id: str, attempt: int) -> RunDir:
        """Return the run directory of one attempt at a calibration."""
        return RunDir(self.root / "calibrations" / calibration_id / f"a{attempt}")

    def job_run(self, job_id: str, attempt: int) -> RunDir:
        """Return the run directory of one training attempt."""
        return RunDir(self.root / "jobs" / job_id / f"a{attempt}")

    def job_runs(self, job_id: str) -> Iterator[tuple[int, RunDir]]:
        """Yield (attempt, run directory) of a job, newest attempt first."""
        folder = self.root / "jobs" / job_id
        attempts = sorted((int(p.name[1:]) for p in folder.glob("a*")), reverse=True)
        for attempt in attempts:
            yield attempt, self.job_run(job_id, attempt)

    def store(self, key: str) -> Path:
        """Return where the packed store with this content key lies."""
        return self.root / "stores" / key

    def model(self, model_id: str) -> Path:
        """Return where a model's files lie."""
        return self.root / "models" / model_id

    def adopt(self, made: Path, place: Path) -> None:
        """Move a finished directory to its final place; one that is already there wins."""
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            shutil.rmtree(made)
            return
        made.rename(place)
        fsync_directory(place.parent)

    def remove(self, path: Path) -> None:
        """Remove a file or a directory tree; several may remove it at once, or it may be gone."""
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.gone")
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed)


def size_bytes(folder: Path) -> int:
    """Return the size of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
