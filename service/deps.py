"""What endpoints ask for, as named types."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from service.db import Database
from service.settings import Settings
from service.storage import Storage


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


SettingsDep = Annotated[Settings, Depends(_settings)]
StorageDep = Annotated[Storage, Depends(_storage)]
DatabaseDep = Annotated[Database, Depends(_database)]


def _writing(database: DatabaseDep) -> Iterator[Session]:
    with database.writing() as session:
        yield session


def _reading(database: DatabaseDep) -> Iterator[Session]:
    with database.reading() as session:
        yield session


# Function scope: the transaction ends before the answer begins. A failed commit is then an error
# that the client sees, and nothing is open while an answer streams.
WriteSession = Annotated[Session, Depends(_writing, scope="function")]
"""A transaction that commits after the endpoint and before the answer."""
ReadSession = Annotated[Session, Depends(_reading, scope="function")]
"""A read-only transaction that ends before the answer."""
