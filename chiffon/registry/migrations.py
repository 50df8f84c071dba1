"""The database's structure and its versions; the steps are in the folder ``migrations``."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from io import StringIO
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel

import chiffon.registry.tables  # noqa: F401  (fills the metadata)
from chiffon.errors import BadConfiguration, TablesMissing
from chiffon.registry.database_url import parse
from chiffon.registry.pool import answering
from chiffon.registry.registry import Registry

VIEWS = ("path_state",)
"""What the migrations make beside the tables, and statements need."""


def head() -> str:
    """Return the newest revision that this chiffon knows, and needs."""
    return str(_scripts().get_current_head())


async def require_head(registry: Registry) -> None:
    """Make sure that the database has the structure this chiffon needs.

    Raises:
        TablesMissing: It is older or newer, or lacks a table; the message says how to mend that.
    """
    revision = await registry.revision()
    if revision != head():
        raise TablesMissing(_explained(revision))
    missing = await registry.missing([*SQLModel.metadata.tables, *VIEWS])
    if missing:
        raise TablesMissing(
            f"the database says it is at revision {revision} and lacks {', '.join(missing)}: "
            "restore it, or give chiffon a database of its own"
        )


def _explained(revision: str | None) -> str:
    if revision is None:
        return "the database has no chiffon tables yet; run `chiffon db upgrade`"
    if revision in _revisions():
        return (
            f"the database is at revision {revision} and chiffon needs {head()}; "
            "run `chiffon db upgrade`"
        )
    return (
        f"the database is at revision {revision}, which this chiffon does not know: "
        "a newer one has upgraded it, so run that one here"
    )


def checks(registry: Registry) -> dict[str, Callable[[], Awaitable[None]]]:
    """Return the checks of ``health`` that tell whether the database can be used."""
    return {
        "database": registry.path.prove_writable,
        "migrations": lambda: require_head(registry),
    }


async def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database up to a revision; a no-op where it is there.

    Two at once take turns. Raises what ``Registry`` raises for a database that is away.

    Raises:
        BadConfiguration: No such revision.
        TablesMissing: A newer chiffon has upgraded it further, or tables are not there after all.
    """
    async with Registry.open(url) as registry:
        current = await registry.revision()
    if current is not None and current not in _revisions():
        raise TablesMissing(_explained(current))
    await _run("upgrade", url, revision)
    if revision == "head":
        async with Registry.open(url) as registry:
            await require_head(registry)


async def downgrade(url: str, revision: str) -> None:
    """Take the database back to a revision (``base``: nothing left).

    Raises:
        BadConfiguration: No such revision.
    """
    await _run("downgrade", url, revision)


async def differences(url: str) -> str | None:
    """Compare the database with the tables that the code has.

    Returns:
        One line that says how they differ, ``None`` if they do not.
    """
    parse(url)  # a URL that is none is not a difference
    try:
        await _run("check", url)
    except BadConfiguration as error:
        return str(error)
    return None


async def _run(name: str, url: str, *arguments: str) -> None:
    # A database that is away shall be reported as everywhere else, not by a traceback.
    async with Registry.open(url) as registry:
        await registry.revision()
    config = _config()
    config.attributes["database_url"] = url
    try:
        with answering():
            try:
                await asyncio.to_thread(getattr(command, name), config, *arguments)
            except DBAPIError as error:
                # What asyncpg raised, before SQLAlchemy wrapped it twice.
                cause = error.orig.__cause__ if error.orig is not None else None
                raise cause or error from None
    except CommandError as error:
        raise BadConfiguration(str(error)) from None


@cache
def _revisions() -> list[str]:
    """Return the revisions that this chiffon knows, newest first."""
    return [script.revision for script in _scripts().walk_revisions()]


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    package = Path(__file__).parents[1]
    # In an installed package the folder lies within it, in the project beside it.
    installed = package / "_migrations"
    folder = installed if installed.is_dir() else package.parent / "migrations"
    config = Config(stdout=StringIO())  # ours speaks of it in its own words
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
