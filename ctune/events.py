"""What a running child says: one JSON object per line, appended and flushed. Never imports torch.

The child (training or ingestion) writes; the supervisor reads whole new lines and stores each under
(job, attempt, seq), so that reading a line twice is harmless. `docs/events.md` lists the kinds.
"""

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from ctune.errors import CtuneError
from ctune.schema import JsonObject, Schema


def storable(value: Any) -> Any:
    """Return `value` as JSON and every database take it: NaN and infinity as None, without NUL."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


class EventBase(Schema):
    """What every event carries; `seq` counts from 0 within one attempt."""

    seq: int = 0
    time: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _as_storable(cls, given: Any) -> Any:
        return storable(given)


class Started(EventBase):
    """The child runs: where, with which versions, resumed from which step."""

    event: Literal["started"] = "started"
    message: str
    details: JsonObject = {}


class StageStarted(EventBase):
    """A stage begins (or goes on after a resume) and will end at `total_steps`."""

    event: Literal["stage"] = "stage"
    stage: str
    step: int = 0
    total_steps: int = 0


class Progress(EventBase):
    """How far the whole run is; `fraction` in [0, 1]; `seconds_remaining` None when unknown."""

    event: Literal["progress"] = "progress"
    stage: str
    step: int
    total_steps: int
    fraction: float
    seconds_remaining: float | None = None


class Metrics(EventBase):
    """Values at one step of one stage; null stands for one that is not finite."""

    event: Literal["metrics"] = "metrics"
    stage: str
    step: int
    values: dict[str, float | None]


class CheckpointSaved(EventBase):
    """A checkpoint is complete on disk. `kept` names the ones that still exist in this attempt.

    `best` names the one with the highest online k-NN accuracy of each stage, where there is one.
    """

    event: Literal["checkpoint"] = "checkpoint"
    name: str
    stage: str
    step: int
    files: dict[str, JsonObject]
    """File name to ``{"sha256": str, "size_bytes": int}``."""
    kept: list[str]
    best: list[str] = []


class Evaluated(EventBase):
    """Scores of the encoder: protocol to metric to value; accuracies in [0, 1]."""

    event: Literal["evaluation"] = "evaluation"
    when: Literal["before", "after"]
    results: dict[str, JsonObject]


class Warned(EventBase):
    """Something a person should look at; the run goes on."""

    event: Literal["warning"] = "warning"
    code: str
    message: str
    hint: str = ""
    details: JsonObject = {}


class Stopped(EventBase):
    """Last word of a child that was asked to stop; it can be resumed."""

    event: Literal["stopped"] = "stopped"
    reason: str


class Failed(EventBase):
    """Last word of a child that cannot finish."""

    event: Literal["failed"] = "failed"
    code: str
    message: str
    hint: str = ""
    fault: Literal["user", "system"] = "system"
    retryable: bool = False

    @classmethod
    def of(cls, error: CtuneError) -> "Failed":
        """Return the last word that an error comes to."""
        return cls(
            code=error.error_code,
            message=error.message,
            hint=error.hint,
            fault=error.fault,
            retryable=error.retryable,
        )


class Finished(EventBase):
    """Last word of a child that did its work; `result` is what the supervisor stores."""

    event: Literal["finished"] = "finished"
    result: JsonObject


Event = Annotated[
    Started | StageStarted | Progress | Metrics | CheckpointSaved | Evaluated | Warned | Stopped
    | Failed | Finished,
    Field(discriminator="event"),
]  # fmt: skip
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
LAST_WORDS = (Stopped, Failed, Finished)


def describe(event: EventBase) -> str:
    """Return an event in words, for lists and logs."""
    match event:
        case Started() | Warned() | Failed():
            return event.message
        case StageStarted():
            return f"stage {event.stage} starts at step {event.step} of {event.total_steps}"
        case CheckpointSaved():
            return f"checkpoint {event.name}"
        case Evaluated():
            return f"encoder scored {event.when} tuning"
        case Stopped():
            return f"stopped: {event.reason}"
        case Metrics():
            known = {name: value for name, value in event.values.items() if value is not None}
            values = " ".join(f"{name} {value:.4g}" for name, value in known.items())
            return f"{event.stage} {event.step}: {values}"
        case Finished():
            return "finished"
        case _:
            return type(event).__name__.lower()


class EventWriter:
    """Appends events to a file, one flushed line each; safe to call from several threads.

    On a file that has events already, numbering goes on behind them; a last line that was not
    completed is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self.catch_up()

    def catch_up(self) -> None:
        """Go on behind all that is there: also what another process wrote that has ended since."""
        ends = [end for _, end in read_events(self._path)]
        self._seq = len(ends)
        self._file.truncate(ends[-1] if ends else 0)

    def write(self, event: EventBase) -> None:
        """Number, stamp and append one event."""
        with self._lock:
            stamped = event.model_copy(update={"seq": self._seq, "time": time.time()})
            self._file.write(stamped.model_dump_json() + "\n")
            self._file.flush()
            self._seq += 1

    def close(self) -> None:
        """Close the file; further writes fail."""
        self._file.close()


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Yield each whole event line after byte `offset` with the offset behind it.

    A last line without its newline is still being written and is left for the next call.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield EVENT.validate_json(line), offset
