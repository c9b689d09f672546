"""A child program that does what the row tells it: `config.stub` of a job, `options` of a data set.

It is a real child (`ctune.child`), but for what it does wrong on purpose.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ctune.child import StopRequest, run_child
from ctune.errors import CtuneError, DataError
from ctune.events import (
    CheckpointSaved,
    EventWriter,
    Finished,
    Metrics,
    Progress,
    StageStarted,
    Started,
    Warned,
)
from ctune.rundir import RunDir

STEP_S = 0.05


class FlakyError(CtuneError):
    """Something that may go away."""

    code = "flaky"
    retryable = True


def plan(run_dir: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the whole run file, and what the row tells this stub."""
    content = json.loads(run_dir.config.read_text())
    return content, content["config"]["stub"] if "config" in content else content["options"]


def body(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> dict[str, Any]:
    """Work in steps, resume from the newest earlier attempt, leave a model or a store behind."""
    content, stub = plan(run_dir)
    events.write(Started(message="stub", details={"pid": os.getpid()}))
    if stub["mode"] == "fail":
        raise DataError("the images are blank", hint="upload others")
    if stub["mode"] == "flaky":
        raise FlakyError("try again")
    if stub["mode"] == "leave a helper":
        helper = subprocess.Popen(["sleep", "600"])
        (run_dir.root / "helper").write_text(str(helper.pid))
    total = max(1, round(stub.get("work_s", 0.0) / STEP_S))
    first = _resume(content.get("resume_from", []))
    stop.finish_requested |= content.get("finish", False)
    events.write(StageStarted(stage="contrastive", step=first, total_steps=total))
    for step in range(first + 1, total + 1):
        time.sleep(STEP_S)
        (run_dir.root / "step").write_text(str(step))
        events.write(Metrics(stage="contrastive", step=step, values={"loss": 1.0 / step}))
        events.write(
            Progress(stage="contrastive", step=step, total_steps=total, fraction=step / total)
        )
        stop.check()
        if stop.finish_requested:
            break
    for name in ("first", "second"):
        events.write(
            CheckpointSaved(name=name, stage="contrastive", step=total, files={}, kept=[name])
        )
    events.write(Warned(code="stub", message="only a stub"))
    return _result(run_dir, content, stub)


def _resume(earlier: list[str]) -> int:
    for folder in earlier:
        written = Path(folder) / "step"
        if written.exists() and written.read_text():
            return int(written.read_text())
    return 0


def _result(run_dir: RunDir, content: dict[str, Any], stub: dict[str, Any]) -> dict[str, Any]:
    if "archive" in content:
        store = run_dir.root / "store"
        store.mkdir()
        (store / "manifest.json").write_text("{}")
        manifest = {"summary": {"num_images": 1}, "report": {"layout": "flat"}}
        return {"store_key": content["archive_sha256"], "manifest": manifest}
    if stub["mode"] != "no model":
        run_dir.model.mkdir()
        (run_dir.model / "model.json").write_text("{}")
    steps = _resume([str(run_dir.root), *content.get("resume_from", [])])
    seen = {"environment": dict(os.environ), "file": content, "steps": steps}
    return {"model": {"embed_dim": 8}, "seen": seen}


def misbehave(mode: str, run_dir: RunDir) -> int:
    """Do what no child should."""
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "exit":
        return 0
    if mode == "crash":
        print("line one\nlast words", file=sys.stderr)
        return 7
    if mode == "half a line":
        events = EventWriter(run_dir.events)
        events.write(Started(message="stub"))
        with run_dir.events.open("a") as file:
            file.write('{"event": "finished", "resu')
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "nonsense":
        run_dir.events.write_text("what is this\n")
        time.sleep(600)
    if mode == "ignore SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (run_dir.root / "ignoring").touch()
        time.sleep(600)
    if mode == "finish and hang":
        run_dir.model.mkdir()
        EventWriter(run_dir.events).write(Finished(result={"model": {}}))
        time.sleep(600)
    raise ValueError(mode)


def main() -> int:
    """Run; the misbehaving modes only in the attempts that the row names, if it names any."""
    run_dir = RunDir(Path(sys.argv[1]))
    _, stub = plan(run_dir)
    mode, attempts = stub["mode"], stub.get("attempts")
    behaves = mode in {"finish", "fail", "flaky", "no model", "leave a helper"}
    if not behaves and (attempts is None or int(os.environ["CTUNE_ATTEMPT"]) in attempts):
        return misbehave(mode, run_dir)
    return run_child(body)


if __name__ == "__main__":
    sys.exit(main())
