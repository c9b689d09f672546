"""Rules and queries of models; commits nothing."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.errors import ConflictError, not_found
from service.jobs.service import active, checked
from service.tables import Job, Model


def get(session: Session, model_id: str) -> Model:
    """Return one model.

    Raises:
        NotFoundError: there is none with this id.
    """
    model = session.get(Model, checked(model_id))
    if model is None:
        raise not_found("model", model_id, "/models")
    return model


def delete(session: Session, model_id: str) -> None:
    """Delete the row of a model; its files go after the commit.

    Raises:
        NotFoundError: there is none with this id.
        ConflictError: a job that has not ended starts from it.
    """
    model = session.scalar(select(Model).where(Model.id == checked(model_id)).with_for_update())
    if model is None:
        raise not_found("model", model_id, "/models")
    starting = Job.config["encoder"]["id"].as_string() == model.id
    users = active(session, starting)
    if users:
        raise ConflictError(
            f"the model {model_id} is the encoder of unfinished jobs: {', '.join(users)}. Wait for"
            " them or cancel them first.",
            code="model_in_use",
        )
    session.delete(model)
