"""How PostgreSQL is reached, and what it or its driver raises, in our words."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import asyncpg

from chiffon.errors import (
    BadConfiguration,
    RegistryRefused,
    RegistryUnavailable,
    RowRefused,
    TablesMissing,
)

ANSWER_SECONDS = 5.0


def asyncpg_url(url: str) -> str:
    """Return the URL in the form that asyncpg takes.

    Raises:
        BadConfiguration: It is not a PostgreSQL URL.
    """
    scheme, has_scheme, _ = url.partition("://")
    if not has_scheme or scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
        raise BadConfiguration(
            "CHIFFON_DATABASE_URL: not a PostgreSQL URL; "
            "it looks like postgresql://user:password@host/database"
        )
    try:
        urlsplit(url).port  # noqa: B018  (reading it checks it)
    except ValueError:
        raise BadConfiguration(
            "CHIFFON_DATABASE_URL: a bad port; in a user name or password, "
            "/ is written %2F, @ %40 and : %3A"
        ) from None
    return f"postgresql{url[len(scheme) :]}"


@contextmanager
def answering() -> Iterator[None]:
    """Turn what asyncpg raises inside the block into chiffon's exceptions."""
    try:
        yield
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
    ) as error:
        raise RegistryRefused(f"the database refused us: {error}") from None
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        raise TablesMissing(
            "the database has no chiffon tables yet; run `chiffon db upgrade`"
        ) from None
    except asyncpg.exceptions.ClientConfigurationError as error:
        raise BadConfiguration(f"CHIFFON_DATABASE_URL: {error}") from None
    except TimeoutError:
        raise RegistryUnavailable(
            f"the database did not answer within {ANSWER_SECONDS:g} s"
        ) from None
    except (
        asyncpg.DataError,
        asyncpg.IntegrityConstraintViolationError,
        ValueError,  # what the driver itself cannot encode
    ) as error:
        raise RowRefused(str(error).partition("\n")[0]) from None
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        # The driver's own state, when the server ends a connection as a query begins on it.
        asyncpg.InternalClientError,
    ) as error:
        raise RegistryUnavailable(f"the database failed us: {error}") from error


@asynccontextmanager
async def one_of(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """Be one of so many at once.

    Raises:
        RegistryUnavailable: There was no place for 5 s.
    """
    with answering():
        async with asyncio.timeout(ANSWER_SECONDS):
            await places.acquire()
    try:
        yield
    finally:
        places.release()


@asynccontextmanager
async def pool(
    url: str, connections: int, settings: Mapping[str, str]
) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    """Open a pool; connections are made when they are needed.

    Args:
        url: As ``asyncpg_url`` takes it.
        connections: How many may be open at once.
        settings: PostgreSQL's, of each session.

    Raises:
        BadConfiguration: Not such a URL.
    """
    with answering():
        opened = await asyncpg.create_pool(
            asyncpg_url(url),
            min_size=0,
            max_size=connections,
            timeout=ANSWER_SECONDS,
            command_timeout=ANSWER_SECONDS,
            max_cached_statement_lifetime=0,
            reset=_leave,
            # Compiling the sweep took five times as long as running it, once a second.
            server_settings={"application_name": "chiffon", "jit": "off", **settings},
        )
    try:
        yield opened
    finally:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await opened.close()
        except TimeoutError:
            opened.terminate()


async def _leave(_: object) -> None:
    """Give a connection back as it is.

    Nothing here changes a session, and a reset is a round trip, as long as most questions take.
    """
