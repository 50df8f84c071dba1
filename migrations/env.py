"""Alembic's entry: over asyncpg, at the database that CHIFFON_DATABASE_URL names.

``chiffon db`` passes the URL in the configuration's attributes; the ``alembic`` command itself
finds it where every chiffon command does.
"""

import asyncio
from logging.config import fileConfig

import asyncpg
from alembic import context
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

import chiffon.registry.tables  # noqa: F401  (fills the metadata)
from chiffon.registry.pool import asyncpg_url
from chiffon.settings import load

config = context.config


def database_url() -> str:
    """Return the URL: the one passed in, else the one the settings have."""
    given: str | None = config.attributes.get("database_url")
    return asyncpg_url(given or load().database_url.get_secret_value())


def migrate(connection: Connection) -> None:
    """Run what was asked for on an open connection, all of it or nothing."""
    context.configure(connection=connection, target_metadata=SQLModel.metadata)
    with context.begin_transaction():
        # Two `chiffon up`, or two orchestrators that migrate at start, take turns.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7450101)")
        context.run_migrations()


async def migrate_online() -> None:
    """Connect and migrate."""
    url = database_url()
    # asyncpg reads the URL, here as everywhere else: SQLAlchemy would read options otherwise.
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(url),
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
        dialect_name="postgresql", target_metadata=SQLModel.metadata, literal_binds=True
    )
    with context.begin_transaction():
        context.run_migrations()


if config.config_file_name is not None and "database_url" not in config.attributes:
    fileConfig(config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    migrate_offline()
else:
    asyncio.run(migrate_online())
