"""Rules and queries of jobs; commits nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from ctune.config import RunConfig, check, resolve
from ctune.encoders import (
    EncoderConfig,
    ModelEncoder,
    TimmEncoder,
    check_encoder,
    check_licence,
    check_model_encoder,
)
from ctune.manifest import DatasetSummary
from ctune.methods import MethodConfig
from ctune.methods.linear_probe.config import LinearProbeConfig
from ctune.schema import Fault, JsonObject
from service.errors import ConflictError, InvalidError, NotFoundError, not_found
from service.faults import body_faults, show
from service.jobs import control, lifecycle
from service.jobs.schemas import JobCreate, Rejected
from service.jobs.states import TERMINAL
from service.settings import Settings
from service.tables import Checkpoint, Dataset, Job, JobTransition, Model, new_id

_ENCODER: TypeAdapter[Any] = TypeAdapter(EncoderConfig)
_METHOD: TypeAdapter[Any] = TypeAdapter(MethodConfig)
_STAND_IN = RunConfig(encoder=TimmEncoder(name="vit_tiny_patch16_224"), method=LinearProbeConfig())


def create(session: Session, settings: Settings, body: JobCreate | Rejected) -> Job:
    """Queue a job.

    Raises:
        InvalidError: with everything that is wrong with it.
    """
    body, config = accepted(session, settings, body)
    job = Job(
        id=new_id("job"),
        name=body.name,
        dataset_id=body.dataset,
        metadata_=body.metadata,
        priority=body.priority,
        config=config.model_dump(mode="json"),
        gpus=config.resources.gpus,
    )
    lifecycle.enqueue(session, job)
    return job


def accepted(
    session: Session, settings: Settings, body: JobCreate | Rejected
) -> tuple[JobCreate, RunConfig]:
    """Return a body that can become a job, with its resolved config.

    Raises:
        InvalidError: with everything that is wrong with it.
    """
    if isinstance(body, Rejected):
        raise InvalidError(body.faults + _faults_of_rest(session, settings, body))
    try:
        given = body.run_config()
        summary = _summary(session, body.dataset)
        config = resolve(given, summary, _model_info(session, given.encoder))
    except ValidationError as error:
        raise InvalidError(body_faults(error.errors(include_url=False), RunConfig)) from error
    faults = _faults(session, settings, config, body.dataset)
    if faults:
        raise InvalidError(faults)
    return body, config


def _faults_of_rest(session: Session, settings: Settings, rejected: Rejected) -> list[Fault]:
    """Check the parts of a rejected body that are right by themselves."""
    body = rejected.body if isinstance(rejected.body, dict) else {}
    parts: dict[str, Any] = {"encoder": _STAND_IN.encoder, "method": _STAND_IN.method}
    kept = []
    for name, adapter in (("encoder", _ENCODER), ("method", _METHOD)):
        try:
            parts[name] = adapter.validate_python(body.get(name))
            kept.append(f"/{name}")
        except ValidationError:
            continue
    dataset_id = body.get("dataset")
    if isinstance(dataset_id, str) and "\0" not in dataset_id:
        kept.append("/dataset")
    else:
        dataset_id = None
    faults = _faults(session, settings, RunConfig(**parts), dataset_id)
    known = {fault.pointer for fault in rejected.faults}
    return [f for f in faults if f.pointer.startswith(tuple(kept)) and f.pointer not in known]


def _faults(
    session: Session, settings: Settings, config: RunConfig, dataset_id: str | None
) -> list[Fault]:
    encoder = config.encoder
    faults = [] if dataset_id is None else _dataset_faults(session, dataset_id)
    consent = settings.allow_noncommercial_weights
    if isinstance(encoder, ModelEncoder):
        faults += _model_faults(session, encoder, consent=consent)
    elif not consent:
        faults += _of_encoder(check_licence(encoder))
    if dataset_id is None or (faults and faults[0].pointer == "/dataset"):
        return faults + _of_encoder(check_encoder(encoder))
    summary = _summary(session, dataset_id)
    assert summary is not None, "a data set without fault is ready"
    return faults + check(config, summary, _model_info(session, encoder))


def _summary(session: Session, dataset_id: str) -> DatasetSummary | None:
    """Return what a data set holds, None where it is not there or not ready."""
    dataset = session.get(Dataset, checked(dataset_id))
    if dataset is None or dataset.summary is None:
        return None
    return DatasetSummary.model_validate(dataset.summary)


def _model_info(session: Session, encoder: EncoderConfig) -> JsonObject | None:
    """Return `model.json` of the model that an encoder names, None where there is none."""
    if not isinstance(encoder, ModelEncoder):
        return None
    model = session.get(Model, checked(encoder.id))
    return model.info if model else None


def _model_faults(session: Session, encoder: ModelEncoder, *, consent: bool) -> list[Fault]:
    wanted = select(Model).where(Model.id == checked(encoder.id)).with_for_update(read=True)
    model = session.scalars(wanted).one_or_none()
    if model is None:
        detail = f"there is no model {show(encoder.id)}. GET /models lists those there are."
        return [Fault(pointer="/encoder/id", code="unknown_model", detail=detail)]
    found = check_model_encoder(encoder, model.info)
    if not consent:
        found += check_licence(encoder, model.info)
    return _of_encoder(found)


def _of_encoder(faults: list[Fault]) -> list[Fault]:
    return [f.model_copy(update={"pointer": "/encoder" + f.pointer}) for f in faults]


def _dataset_faults(session: Session, dataset_id: str) -> list[Fault]:
    # Shared lock: the data set cannot be deleted between this look and the commit.
    wanted = select(Dataset).where(Dataset.id == dataset_id).with_for_update(read=True)
    dataset = session.scalars(wanted).one_or_none()
    if dataset is None:
        code, said = "unknown_dataset", "does not exist. GET /datasets lists those there are."
    elif dataset.status == "ready":
        return []
    elif dataset.status in ("queued", "running"):
        code = "dataset_not_ready"
        said = f"is still being read. Wait until GET /datasets/{dataset_id} says ready."
    else:
        reason = (dataset.error or {}).get("message", "see its error")
        code, said = "dataset_failed", f"cannot be used: {reason}. Upload a corrected archive."
    detail = f"the data set {show(dataset_id)} {said}"
    return [Fault(pointer="/dataset", code=code, detail=detail)]


def get(session: Session, job_id: str) -> Job:
    """Return one job.

    Raises:
        NotFoundError: there is none with this id.
    """
    job = session.get(Job, checked(job_id))
    if job is None:
        raise _no_job(job_id)
    return job


def transitions(session: Session, job_id: str) -> list[JobTransition]:
    """Return the stays of a job, oldest first."""
    wanted = select(JobTransition).where(JobTransition.job_id == job_id).order_by(JobTransition.id)
    return list(session.scalars(wanted))


def jobs_ahead(session: Session, job: Job) -> int | None:
    """Return how many queued jobs are claimed before this one; None when it is not queued."""
    if job.status != "queued":
        return None
    before = or_(Job.priority > job.priority, (Job.priority == job.priority) & (Job.id < job.id))
    return session.scalar(select(func.count()).where(Job.status == "queued", before))


def ask(session: Session, job_id: str, request: Callable[[Session, str], Job]) -> Job:
    """Make one of the requests of `service.jobs.control`.

    Raises:
        NotFoundError: there is none with this id.
        ConflictError: its state does not allow this.
    """
    try:
        return request(session, checked(job_id))
    except control.NotFoundError as error:
        raise _no_job(job_id) from error
    except control.WrongStateError as error:
        raise ConflictError(str(error), code=error.code) from error


def get_checkpoint(session: Session, checkpoint_id: str) -> Checkpoint:
    """Return one checkpoint.

    Raises:
        NotFoundError: there is none with this id (any more).
    """
    found = session.get(Checkpoint, checked(checkpoint_id))
    if found is None:
        raise not_found("checkpoint", checkpoint_id, "/jobs/{id}/checkpoints")
    return found


def active(session: Session, *where: Any) -> Sequence[str]:
    """Return the ids of up to 5 jobs that have not ended and match `where`."""
    wanted = select(Job.id).where(Job.status.not_in(TERMINAL), *where).order_by(Job.id)
    return session.scalars(wanted.limit(5)).all()


def checked(key: str) -> str:
    """Return `key` as Postgres may see it: with a NUL it is no id, and an error there."""
    return key.replace("\0", "?")


def _no_job(job_id: str) -> NotFoundError:
    return not_found("job", job_id, "/jobs")
