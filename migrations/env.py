"""Alembic's entry: migrates on the connection that `service.db.run_migrations` hands over."""

from alembic import context

from service.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    compare_type=True,
    # SQLite's DDL is transactional once the driver leaves BEGIN to us (`service.db`).
    transactional_ddl=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
