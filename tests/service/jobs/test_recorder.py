"""What a child says, stored once however often it is read."""

from sqlalchemy import func, select

from ctune.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Failed,
    Finished,
    Metrics,
    Progress,
    StageStarted,
    Started,
    Stopped,
    Warned,
)
from service.db import Database
from service.jobs import lifecycle
from service.jobs.lifecycle import Ending, Lease
from service.jobs.recorder import store_events
from service.tables import Checkpoint, Dataset, JobEvent, Metric
from tests.workers.rows import add_dataset, add_jobs, claim_job, get_job, stays


def _numbered(*events: Event) -> list[Event]:
    return [event.model_copy(update={"seq": seq}) for seq, event in enumerate(events)]


SAID = _numbered(
    Started(message="hello\x00", details={"torch": "2\x00"}),
    StageStarted(stage="contrastive", total_steps=10),
    Metrics(stage="contrastive", step=1, values={"loss": 2.0, "lr": 0.1}),
    Metrics(stage="contrastive", step=2, values={"loss": None, "x" * 99: 1.0}),
    Progress(stage="contrastive", step=2, total_steps=10, fraction=0.2, seconds_remaining=8.0),
    CheckpointSaved(name="a", stage="contrastive", step=1, files={}, kept=["a"]),
    CheckpointSaved(name="b", stage="contrastive", step=2, files={"f": {}}, kept=["b"]),
    Evaluated(when="after", results={"knn": {"top1": 0.5}}),
    Warned(code="w", message="careful" * 1000, hint="h"),
    StageStarted(stage="classifier", total_steps=5),
    Stopped(reason="asked"),
    Failed(code="c", message="m"),
    Finished(result={"model": {}}),
)


def _store(
    database: Database, lease: Lease, events: list[Event], attempt: int | None = None
) -> None:
    with database.writing() as session:
        store_events(
            session,
            lease,
            events,
            checkpoints=f"jobs/{lease.id}/a1/checkpoints",
            attempt=attempt or lease.attempt,
        )


def test_reading_twice_is_harmless(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    _store(database, lease, SAID[:8])
    _store(database, lease, SAID)
    _store(database, lease, SAID)
    with database.reading() as session:
        said = select(JobEvent).where(JobEvent.seq.is_not(None)).order_by(JobEvent.id)
        events = list(session.scalars(said))
        metrics = {(row.name, row.step): row.value for row in session.scalars(select(Metric))}
        (checkpoint,) = session.scalars(select(Checkpoint))
    kinds = [event.kind for event in events]
    assert kinds == [
        "started", "stage", "checkpoint", "checkpoint", "evaluation", "warning", "stage",
        "stopped", "failed", "finished",
    ]  # fmt: skip
    assert [event.level for event in events if event.level != "info"] == ["warning", "error"]
    assert (events[0].message, events[0].data) == ("hello", {"details": {"torch": "2"}})
    assert events[4].data["results"] == {"knn": {"top1": 0.5}}
    assert events[-1].data == {}
    assert metrics == {
        ("loss", 1): 2.0, ("lr", 1): 0.1, ("loss", 2): None, ("x" * 64, 2): 1.0,
    }  # fmt: skip
    assert (checkpoint.name, checkpoint.path) == ("b", f"jobs/{job_id}/a1/checkpoints/b")
    job = get_job(database, job_id)
    assert job.phase == "classifier"
    assert job.progress == {
        "stage": "contrastive", "step": 2, "total_steps": 10, "fraction": 0.2,
        "seconds_remaining": 8.0,
    }  # fmt: skip
    phases = [stay.phase for stay in stays(database, job_id)]
    assert phases[:4] == [None, None, "contrastive", "classifier"]


def test_a_later_attempt_overwrites_the_steps_it_repeats(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    _store(database, lease, SAID[:8])
    with database.writing() as session:
        lifecycle.release(session, lease, "")
    again = claim_job(database)
    _store(database, again, _numbered(Metrics(stage="contrastive", step=2, values={"loss": 3.0})))
    with database.reading() as session:
        found = session.execute(
            select(Metric.step, Metric.value, Metric.attempt)
            .where(Metric.name == "loss")
            .order_by(Metric.step)
        )
        assert [tuple(row) for row in found] == [(1, 2.0, 1), (2, 3.0, 2)]
    with database.writing() as session:
        lifecycle.finish(session, again, Ending("succeeded"))
    assert get_job(database, job_id).status == "succeeded"


def test_an_earlier_attempt_is_heard_to_its_end(database: Database) -> None:
    (job_id,) = add_jobs(database)
    first = claim_job(database)
    _store(database, first, SAID[:3])
    with database.writing() as session:
        lifecycle.release(session, first, "")
    second = claim_job(database)
    _store(database, second, SAID, attempt=1)
    with database.reading() as session:
        events = session.scalars(select(JobEvent).where(JobEvent.seq.is_not(None))).all()
        assert len(session.scalars(select(Metric)).all()) == 4
    assert {event.attempt for event in events} == {1}
    assert len(events) == 10
    job = get_job(database, job_id)
    assert (job.progress, job.phase) == (None, "contrastive")


def test_of_an_ingestion_only_progress_is_kept(database: Database) -> None:
    with database.writing() as session:
        row = add_dataset(session, status="running", attempt=1, owner="w")
    lease = Lease(Dataset, row.id, 1, "w")
    _store(database, lease, SAID)
    with database.reading() as session:
        progress = session.get_one(Dataset, row.id).progress
        assert session.scalar(select(func.count()).select_from(JobEvent)) == 0
    assert progress is not None
    assert progress["fraction"] == 0.2


def test_an_earlier_attempt_that_is_read_again_keeps_its_checkpoints(database: Database) -> None:
    """Their ids are links that somebody may hold."""
    add_jobs(database)
    lease = claim_job(database)
    _store(database, lease, SAID)
    with database.reading() as session:
        before = session.scalars(select(Checkpoint.id)).all()
    _store(database, lease, SAID[:6])  # up to the checkpoint that was pruned since
    with database.reading() as session:
        assert session.scalars(select(Checkpoint.id)).all() == before


def test_the_best_checkpoint_of_each_stage_is_marked(database: Database) -> None:
    add_jobs(database)
    lease = claim_job(database)

    def saved(name: str, step: int, best: list[str]) -> CheckpointSaved:
        return CheckpointSaved(
            name=name, stage="contrastive", step=step, files={}, kept=["a", "b", "c"], best=best
        )

    events = _numbered(saved("a", 1, ["a"]), saved("b", 2, ["b"]), saved("c", 3, ["b"]))
    _store(database, lease, events)
    with database.reading() as session:
        found = session.execute(select(Checkpoint.name, Checkpoint.best)).all()
    assert {(name, best) for name, best in found} == {("a", False), ("b", True), ("c", False)}
