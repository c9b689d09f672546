"""Rules and queries of data sets; commits nothing."""

from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.datasets.schemas import parse_name, parse_options
from service.datasets.upload import Received
from service.errors import ConflictError, InvalidError, NotFoundError, not_found
from service.jobs import lifecycle
from service.jobs.service import active, checked
from service.storage import Storage
from service.tables import Dataset, Job


def described(dataset_id: str, received: Received, storage: Storage) -> Dataset:
    """Return the row for an upload.

    Raises:
        InvalidError: with everything that is wrong with its fields.
    """
    name, name_faults = parse_name(received.fields.get("name"), received.filename)
    options, option_faults = parse_options(received.fields.get("options"))
    faults = received.faults + name_faults + option_faults
    if faults:
        raise InvalidError(faults)
    return Dataset(
        id=dataset_id,
        name=name,
        size_bytes=received.size_bytes,
        archive_sha256=received.sha256,
        upload=storage.relative(storage.upload(dataset_id)),
        options=options.model_dump(mode="json"),
    )


def create(session: Session, dataset: Dataset) -> None:
    """Queue a data set for ingestion; its archive is in its place."""
    lifecycle.enqueue(session, dataset)
    session.flush()
    session.refresh(dataset)


def get(session: Session, dataset_id: str) -> Dataset:
    """Return one data set.

    Raises:
        NotFoundError: there is none with this id.
    """
    dataset = session.get(Dataset, checked(dataset_id))
    if dataset is None:
        raise _no_dataset(dataset_id)
    return dataset


def get_ready(session: Session, dataset_id: str) -> Dataset:
    """Return one data set whose images can be read.

    Raises:
        NotFoundError: there is none with this id.
        ConflictError: it is not ready.
    """
    dataset = get(session, dataset_id)
    if dataset.status != "ready" or dataset.store is None:
        raise ConflictError(
            f"the data set {dataset_id} is not ready, it has no images to show yet. Wait until GET"
            f" /datasets/{dataset_id} says ready.",
            code="dataset_not_ready",
        )
    return dataset


def delete(session: Session, dataset_id: str, storage: Storage) -> list[Path]:
    """Delete the row of a data set and return the files that go after the commit.

    Raises:
        NotFoundError: there is none with this id.
        ConflictError: it is being read, or a job that has not ended uses it.
    """
    wanted = select(Dataset).where(Dataset.id == checked(dataset_id)).with_for_update()
    dataset = session.scalars(wanted).one_or_none()
    if dataset is None:
        raise _no_dataset(dataset_id)
    users = active(session, Job.dataset_id == dataset_id)
    if users:
        raise ConflictError(
            f"the data set {dataset_id} is used by unfinished jobs: {', '.join(users)}. Wait for"
            " them or cancel them first.",
            code="dataset_in_use",
        )
    if dataset.status == "running":
        raise ConflictError(
            f"the data set {dataset_id} is being read by a worker. Delete it when it is ready or"
            " failed.",
            code="dataset_processing",
        )
    files = [storage.upload(dataset.id), storage.ingest_run(dataset.id, 0).root.parent]
    if dataset.store is not None and not _store_is_shared(session, dataset):
        files.append(storage.absolute(dataset.store))
    session.delete(dataset)
    return files


def _store_is_shared(session: Session, dataset: Dataset) -> bool:
    """Whether another data set has this store, or may be about to take it over."""
    unfinished = Dataset.status.in_(("queued", "running"))
    same_archive = Dataset.archive_sha256 == dataset.archive_sha256
    others = select(Dataset.id).where(
        Dataset.id != dataset.id,
        or_(Dataset.store == dataset.store, unfinished & same_archive),
    )
    return session.scalar(others.limit(1)) is not None


def _no_dataset(dataset_id: str) -> NotFoundError:
    return not_found("data set", dataset_id, "/datasets")
