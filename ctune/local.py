"""Runs without a service: what `ctune.run` does."""

import hashlib
from pathlib import Path

from ctune.child import StopRequest
from ctune.client_archive import zip_folder
from ctune.config import RunConfig
from ctune.errors import ConfigError, CtuneError
from ctune.events import EventWriter, Failed, Finished
from ctune.ingest import ingest
from ctune.pipeline import RunFile
from ctune.ranks import run_with_its_gpus
from ctune.rundir import RunDir, write_atomically
from ctune.schema import JsonObject
from ctune.store import MANIFEST, PackedStore


def run_locally(
    config: RunConfig | JsonObject,
    data: Path,
    out_dir: Path,
    *,
    allow_noncommercial_weights: bool = False,
) -> JsonObject:
    """Do a run in `out_dir`, in this process or one per GPU; see `ctune.run`."""
    run_config = config if isinstance(config, RunConfig) else RunConfig.model_validate(config)
    run_dir = RunDir(out_dir).create()
    with run_dir.lock():
        events = EventWriter(run_dir.events)
        try:
            file = RunFile(
                config=run_config,
                data=open_data(data, run_dir),
                allow_noncommercial_weights=allow_noncommercial_weights,
            )
            write_atomically(run_dir.config, file.model_dump_json(indent=2).encode())
            result = run_with_its_gpus(run_dir, events, StopRequest())
            events.write(Finished(result=result))
        except CtuneError as error:
            events.write(Failed.of(error))
            raise
        finally:
            events.close()
    return result


def open_data(data: Path, run_dir: RunDir) -> Path:
    """Return the packed store of `data`: itself, or one made of an archive or a folder of images.

    Raises:
        ConfigError: the run directory holds the store of other images.
        DataError: the archive or folder cannot be used.
    """
    if (data / MANIFEST).exists():
        return data.absolute()
    if data.is_dir():
        if run_dir.root.is_relative_to(data.absolute()):
            raise ConfigError(
                f"the run directory {run_dir.root} lies inside the images {data}",
                hint="use a run directory beside them",
            )
        with zip_folder(data, beside=run_dir.root) as packed:
            return _unpack(Path(packed.name), run_dir, called=data)
    return _unpack(data, run_dir, called=data)


def _unpack(archive: Path, run_dir: RunDir, *, called: Path) -> Path:
    store = run_dir.root / "store"
    with archive.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not (store / MANIFEST).exists():
        ingest(archive, store, archive_sha256=sha256)
    elif PackedStore(store).manifest.archive_sha256 != sha256:
        raise ConfigError(
            f"{run_dir.root} holds a run on other images than those of {called}",
            hint="use a new run directory",
        )
    return store
