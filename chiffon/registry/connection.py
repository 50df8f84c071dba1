"""How PostgreSQL is reached, and what it or its driver raises, in our words."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from urllib.parse import urlsplit

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from chiffon.errors import (
    BadConfiguration,
    RegistryRefused,
    RegistryUnavailable,
    RowRefused,
    TablesMissing,
)

ANSWER_SECONDS = 5.0

KEPT_SECONDS = 60.0
"""A connection that nobody used for so long is the pool's again, which ends it after 300 s more."""


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
        async with asyncio.timeout(ANSWER_SECONDS if places.locked() else None):
            await places.acquire()
    try:
        yield
    finally:
        places.release()


class Connections:
    """So many connections to PostgreSQL, each used by one task at a time.

    asyncpg's pool takes two thirds of a short question's time to give a connection and to take it
    back. Those that were used lately are therefore kept in hand, and to the pool is left what is
    rare: to make connections, to wait until a statement that was cancelled has ended, to end what
    nobody uses.

    Args:
        pool: Who makes them.
        most: How many may be in use at once.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", most: int) -> None:
        self._pool = pool
        self._places = asyncio.Semaphore(most)
        self._in_hand: list[tuple[PoolConnectionProxy[asyncpg.Record], float]] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, most: int, settings: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator["Connections"]:
        """Provide connections; each is made when it is needed.

        Args:
            url: As ``asyncpg_url`` takes it.
            most: How many may be in use at once.
            settings: PostgreSQL's, of each session.

        Raises:
            BadConfiguration: Not such a URL.
        """
        with answering():
            pool = await asyncpg.create_pool(
                asyncpg_url(url),
                min_size=0,
                max_size=most,
                timeout=ANSWER_SECONDS,
                command_timeout=ANSWER_SECONDS,
                max_cached_statement_lifetime=0,
                reset=_leave,
                # Compiling the sweep took five times as long as running it, once a second.
                server_settings={"application_name": "chiffon", "jit": "off", **settings},
            )
        opened = cls(pool, most)
        try:
            yield opened
        finally:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await opened.put_back()
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    @asynccontextmanager
    async def one(self) -> AsyncIterator["PoolConnectionProxy[asyncpg.Record]"]:
        """Provide a connection; what asyncpg raises is raised in our words.

        Raises:
            RegistryUnavailable: None was to be had within 5 s, or what asyncpg raised.
        """
        with answering():
            async with one_of(self._places):
                connection = await self._take()
                try:
                    yield connection
                except BaseException:
                    await self._pool.release(connection)
                    raise
                now = time.monotonic()
                self._in_hand.append((connection, now))
                await self.put_back(math.inf if self._pool.is_closing() else now - KEPT_SECONDS)

    async def _take(self) -> "PoolConnectionProxy[asyncpg.Record]":
        while self._in_hand:
            connection, _ = self._in_hand.pop()
            if _is_open(connection):
                return connection
            await self._pool.release(connection)
        return await self._pool.acquire(timeout=ANSWER_SECONDS)

    async def put_back(self, before: float = math.inf) -> None:
        """Give those back to the pool that were last used before then, or all that are in hand."""
        while self._in_hand and self._in_hand[0][1] < before:
            connection, _ = self._in_hand.pop(0)
            await self._pool.release(connection)


def _is_open(connection: "PoolConnectionProxy[asyncpg.Record]") -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # it broke, and the pool has it back already
        return False


async def _leave(_: object) -> None:
    """Give a connection back as it is.

    Nothing here changes a session, and a reset is a round trip, as long as most questions take.
    """
