"""Runs without a service: what `ctune.run` does."""

from pathlib import Path

from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.events import EventWriter, Finished
from ctune.ingest import ingest
from ctune.pipeline import RunFile, run_directory
from ctune.rundir import RunDir, write_atomically
from ctune.schema import JsonObject


def run_locally(config: RunConfig | JsonObject, data: Path, out_dir: Path) -> JsonObject:
    """Do a run in `out_dir` in this process; see `ctune.run`."""
    run_config = config if isinstance(config, RunConfig) else RunConfig.model_validate(config)
    run_dir = RunDir(out_dir).create()
    with run_dir.lock():
        store = data if data.is_dir() else run_dir.root / "store"
        if not data.is_dir() and not (store / "manifest.json").exists():
            ingest(data, store)
        file = RunFile(config=run_config, data=store.absolute())
        write_atomically(run_dir.config, file.model_dump_json(indent=2).encode())
        events = EventWriter(run_dir.events)
        try:
            result = run_directory(run_dir, events, StopRequest(), file=file)
            events.write(Finished(result=result))
        finally:
            events.close()
    return result
