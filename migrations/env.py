"""Alembic's entry: over asyncpg, at the database that CHIFFON_DATABASE_URL names.

``chiffon db`` passes the URL in the configuration's attributes; the ``alembic`` command itself
finds it where every chiffon command does.
"""

import asyncio
from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

import chiffon.registry.tables  # noqa: F401  (fills the metadata)
from chiffon.registry.session import connect_for_migrations
from chiffon.settings import load

config = context.config

VERSION_TABLE = "chiffon_version"
"""Not Alembic's own name: another program in this database may use Alembic too."""


def database_url() -> str:
    """Return the URL: the one passed in, else the one the settings have."""
    given: str | None = config.attributes.get("database_url")
    return given or load().database_url.get_secret_value()


def migrate(connection: Connection) -> None:
    """Run what was asked for on an open connection, all of it or nothing."""
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        version_table=VERSION_TABLE,
        include_object=_is_ours,
    )
    with context.begin_transaction():
        # Two `chiffon up`, or two orchestrators that migrate at start, take turns.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7450101)")
        context.run_migrations()


def _is_ours(_: object, name: str | None, kind: str, is_reflected: bool, other: object) -> bool:
    """Leave the tables of other programs out of a comparison."""
    return not (kind == "table" and is_reflected and other is None)


async def migrate_online() -> None:
    """Connect and migrate."""
    url = database_url()
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect_for_migrations(url),  # the same session as everywhere else
        poolclass=pool.NullPool,
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
    finally:
        await engine.dispose()


def migrate_offline() -> None:
    """Print the SQL instead of running it (``alembic upgrade head --sql``)."""
    context.configure(
        dialect_name="postgresql",
        target_metadata=SQLModel.metadata,
        literal_binds=True,
        version_table=VERSION_TABLE,
    )
    with context.begin_transaction():
        context.run_migrations()


if config.config_file_name is not None and "database_url" not in config.attributes:
    fileConfig(config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    migrate_offline()
else:
    asyncio.run(migrate_online())
