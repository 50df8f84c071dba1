"""Connections to PostgreSQL, and what it or its driver raises, in chiffon's own exceptions."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from types import MappingProxyType
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from chiffon.errors import (
    ChiffonError,
    RegistryRefused,
    RegistryUnavailable,
    RowRefused,
    TablesMissing,
)
from chiffon.registry.session import ANSWER_SECONDS, Session, Sessions
from chiffon.registry.statements import STATEMENTS

CLOSE_SECONDS = 1.0

STREAMED_ROWS = 1_000

KEPT_SECONDS = 60.0
"""A connection that was not used for so long goes back to asyncpg's pool, which closes it after
300 s more."""


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
            "the database lacks tables or columns that chiffon needs; run `chiffon db upgrade`"
        ) from None
    except TimeoutError:
        raise RegistryUnavailable(
            f"the database did not answer within {ANSWER_SECONDS:g} s"
        ) from None
    except _OF_A_ROW as error:
        raise RowRefused(str(error).partition("\n")[0]) from None
    except (
        # The network, and its certificates: an error of those is a ValueError as well.
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        # The driver's own state, when the server ends a connection as a query begins on it.
        asyncpg.InternalClientError,
    ) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise RegistryUnavailable(f"the database failed us: {said or error}") from error


_OF_A_ROW = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.RaiseError,
)
"""What PostgreSQL says of a value, and nothing else: a heartbeat that raises this is set aside. The
driver says ``DataError`` of what it cannot encode."""


@asynccontextmanager
async def one_of(limit: asyncio.Semaphore) -> AsyncIterator[None]:
    """Be one of so many at once.

    Raises:
        RegistryUnavailable: So many others were at it for 5 s.
    """
    with answering():
        async with asyncio.timeout(ANSWER_SECONDS if limit.locked() else None):
            await limit.acquire()
    try:
        yield
    finally:
        limit.release()


class Transaction:
    """Statements of ``sql`` that are committed together. Made by ``Pool.transaction``."""

    def __init__(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        self._connection = connection

    async def fetch(
        self, name: str, *, answer_seconds: float | None = None, **parameters: Any
    ) -> list[asyncpg.Record]:
        """Run one statement, as ``Pool.fetch`` does."""
        statement = STATEMENTS[name]
        return await self._connection.fetch(
            statement.text, *statement.arguments(parameters), timeout=answer_seconds
        )

    async def set_local(self, **settings: str) -> None:
        """Set settings of PostgreSQL until the end of the transaction."""
        for name, value in settings.items():
            await self._connection.execute("SELECT set_config($1, $2, true)", name, value)

    async def stream(self, name: str, **parameters: Any) -> AsyncIterator[list[asyncpg.Record]]:
        """Yield the rows of a statement some at a time, however many there are."""
        statement = STATEMENTS[name]
        cursor = await self._connection.cursor(statement.text, *statement.arguments(parameters))
        while rows := await cursor.fetch(STREAMED_ROWS):
            yield rows


class Pool:
    """So many connections to PostgreSQL, each used by one task at a time.

    asyncpg's pool takes two thirds of a short statement's time to lend a connection and to take it
    back. Those that were used lately are therefore kept here, and asyncpg's pool does what is rare:
    it opens connections, waits until a statement that was cancelled has ended, and closes what
    nobody uses.

    Args:
        pool: asyncpg's, which opens them.
        most: How many may be in use at once.
        sessions: Opens them.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", most: int, sessions: Sessions) -> None:
        self._pool = pool
        self._sessions = sessions
        self._closing: set[asyncio.Task[None]] = set()
        self._free = asyncio.Semaphore(most)
        self._kept: list[tuple[PoolConnectionProxy[asyncpg.Record], float]] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, most: int, settings: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator["Pool"]:
        """Provide connections; each is made when it is needed.

        Args:
            url: As ``database_url.parse`` takes it.
            most: How many may be in use at once.
            settings: PostgreSQL's, of each connection.

        Raises:
            BadConfiguration: Not such a URL.
        """
        sessions = Sessions(url, settings)
        pool = await asyncpg.create_pool(
            connect=sessions.connect,
            connection_class=Session,
            min_size=0,
            max_size=most,
            reset=_leave,
        )
        opened = cls(pool, most, sessions)
        try:
            yield opened
        finally:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await opened.put_back()
                    await asyncio.gather(*opened._closing)
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    @asynccontextmanager
    async def one(self) -> AsyncIterator["PoolConnectionProxy[asyncpg.Record]"]:
        """Provide a connection; what asyncpg raises is raised as chiffon's own.

        Raises:
            RegistryUnavailable: None was to be had within 5 s, or what asyncpg raised.
        """
        with answering():
            async with one_of(self._free):
                connection = await self._lend()
                try:
                    if self._sessions.is_pooled:
                        async with connection.transaction(isolation="read_committed"):
                            await self._sessions.begin_pooled(connection)
                            yield connection
                    else:
                        yield connection
                except (*_OF_A_ROW, ChiffonError, asyncio.CancelledError):
                    await self._pool.release(connection)
                    raise
                except BaseException:
                    self._end(connection)
                    raise
                now = time.monotonic()
                self._kept.append((connection, now))
                await self.put_back(math.inf if self._pool.is_closing() else now - KEPT_SECONDS)

    async def fetch(
        self, name: str, *, answer_seconds: float | None = None, **parameters: Any
    ) -> list[asyncpg.Record]:
        """Run one statement of ``sql``, in a transaction of its own.

        Args:
            name: The statement's.
            answer_seconds: For PostgreSQL to answer, if not 5.
            **parameters: By the names that the statement has.

        Raises:
            RegistryUnavailable: As ``one``.
        """
        statement = STATEMENTS[name]
        async with self.one() as connection:
            return await connection.fetch(
                statement.text, *statement.arguments(parameters), timeout=answer_seconds
            )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Transaction"]:
        """Provide a transaction: committed at the end, rolled back if the block raises.

        Raises:
            RegistryUnavailable: As ``one``.
        """
        async with self.one() as connection:
            if self._sessions.is_pooled:  # in a transaction already
                yield Transaction(connection)
                return
            async with connection.transaction():
                yield Transaction(connection)

    def _end(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        """End a connection that may never be of use again; whoever waits need not wait for it.

        A session that was opened while the database took no writes stays so for as long as it
        lives, and answers.
        """

        async def end() -> None:
            with suppress(Exception):
                await connection.close(timeout=CLOSE_SECONDS)
            with suppress(Exception):
                await self._pool.release(connection)

        ending = asyncio.create_task(end(), name="ends a connection")
        self._closing.add(ending)
        ending.add_done_callback(self._closing.discard)

    async def _lend(self) -> "PoolConnectionProxy[asyncpg.Record]":
        while self._kept:
            connection, _ = self._kept.pop()
            if _is_open(connection):
                return connection
            await self._pool.release(connection)
        return await self._pool.acquire(timeout=ANSWER_SECONDS)

    async def put_back(self, before: float = math.inf) -> None:
        """Give those back to the pool that were last used before then, or all that are kept."""
        while self._kept and self._kept[0][1] < before:
            connection, _ = self._kept.pop(0)
            await self._pool.release(connection)


def _is_open(connection: "PoolConnectionProxy[asyncpg.Record]") -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # it broke, and the pool has it back already
        return False


async def _leave(_: object) -> None:
    """Give a connection back as it is.

    Nothing here changes a connection, and a reset is a round trip, as long as most questions take.
    """
