"""One session with PostgreSQL: which host, and with what settings, whoever else set others.

Migrations and the pools open theirs here, so what holds for one holds for all.
"""

import asyncio
import logging
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from chiffon.errors import RegistryUnavailable
from chiffon.registry.database_url import DatabaseUrl, parse

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0

SETTINGS: Mapping[str, str] = {
    # The claims look at a row again after they waited for it, which only this level does. Under
    # "repeatable read" two planners at once are a serialization failure, eleven times in twenty.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # What statements write as text, and read back.
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "transform_null_equals": "off",
    # We stop waiting after 5 s (a sweep after 30 s), which also cancels the statement. These are
    # for a process that froze, or whose host is gone, with rows locked.
    "statement_timeout": "60s",
    "idle_in_transaction_session_timeout": "30s",
    "lock_timeout": "0",
    # Compiling the sweep took five times as long as running it, once a second.
    "jit": "off",
    "plan_cache_mode": "auto",
}
"""What our statements rely on, set for each session: a database and a role have defaults of their
own. Not set are ``default_transaction_read_only``, by which an administrator keeps everybody from
writing, and ``synchronous_commit``, which is how safe a commit is to be."""


NO_LIMITS = dict.fromkeys(("statement_timeout", "idle_in_transaction_session_timeout"), "0")


class Session(asyncpg.Connection):
    """A session. ``is_pooled``: a pooler may give each of its transactions to another server."""

    __slots__ = ("is_pooled",)
    is_pooled: bool

    async def prepare(  # type: ignore[override]
        self, query: str, *, name: str | None = None, **more: Any
    ) -> "PreparedStatement[asyncpg.Record]":
        """Prepare a statement; behind a pooler without a name, as others there use the names."""
        return await super().prepare(query, name="" if self.is_pooled else name, **more)


class Sessions:
    """Opens sessions with whichever host answers.

    ``is_pooled``: the database is behind a pooler, as far as that is known.

    Args:
        url: As ``database_url.parse`` takes it.
        settings: More of them, for each session.
        answer_seconds: For PostgreSQL to answer a statement; ``None``: as long as it takes.

    Raises:
        BadConfiguration: Not such a URL.
    """

    def __init__(
        self,
        url: str,
        settings: Mapping[str, str] = MappingProxyType({}),
        *,
        answer_seconds: float | None = ANSWER_SECONDS,
    ) -> None:
        self._answer_seconds = answer_seconds
        self._url: DatabaseUrl = parse(url)
        self._settings = {**SETTINGS, **self._url.settings, **settings}
        # Behind a pooler that is known of there is no need to find out again.
        self.is_pooled = self._url.prepared_statements == "off"
        self._first = random.randrange(len(self._url.hosts)) if self._url.is_balanced else 0

    async def connect(self, *_: Any, **driver: Any) -> Session:
        """Open a session; the host that was used last is tried first.

        Args:
            *_: For asyncpg's pool.
            **driver: For asyncpg.

        Raises:
            asyncpg.PostgresError: A host refused us. As with libpq, no other is tried then.
            RegistryUnavailable: None of several hosts let us in, or lets us write.
            OSError, TimeoutError: The only host is not reachable.
        """
        hosts = self._url.hosts
        seconds = ANSWER_SECONDS / len(hosts)
        troubles: list[Exception] = []
        for step in range(len(hosts)):
            at = (self._first + step) % len(hosts)
            try:
                session = await self._connect(
                    hosts[at], min(self._url.connect_seconds or seconds, seconds), driver
                )
            except (
                OSError,
                TimeoutError,
                asyncpg.CannotConnectNowError,
                asyncpg.TargetServerAttributeNotMatched,
            ) as error:
                troubles.append(error)
            else:
                self._first = at
                return session
        if len(hosts) == 1 and not isinstance(troubles[0], asyncpg.TargetServerAttributeNotMatched):
            raise troubles[0]
        raise RegistryUnavailable(
            "; ".join(
                f"{_shown(hosts[(self._first + step) % len(hosts)])}: {_said(trouble)}"
                for step, trouble in enumerate(troubles)
            )
        )

    async def begin_pooled(self, session: Any) -> None:
        """Set the settings of the transaction that began; a pooler keeps none for the next."""
        await session.execute(_set(self._settings, is_local=True))

    async def _connect(
        self, host: tuple[str, int] | None, seconds: float, driver: Mapping[str, Any]
    ) -> Session:
        session = await self._open(host, seconds, driver)
        if session.is_pooled:
            return session
        # One round trip, and no prepared statement, which a pooler might give to another server.
        # A pooler makes up the number by which a statement is cancelled.
        check = _UNLESS_POOLED.format(pid=session.get_server_pid())
        if self._url.prepared_statements == "on":
            check = ""
        try:
            await session.execute(f"{_set(self._settings)}{check}", timeout=seconds)
        except asyncpg.DivisionByZeroError:
            log.info("the database is behind a pooler: no prepared statements")
            self.is_pooled = True
            session.terminate()
            return await self._open(host, seconds, driver)
        except BaseException:
            session.terminate()
            raise
        return session

    async def _open(
        self, host: tuple[str, int] | None, seconds: float, driver: Mapping[str, Any]
    ) -> Session:
        where = {} if host is None else {"host": host[0], "port": host[1]}
        is_pooled = self.is_pooled  # others may find it out while this one is being opened
        session: Session = await asyncpg.connect(
            **{**self._url.driver, **driver, **where, "connection_class": Session},
            timeout=seconds,
            command_timeout=self._answer_seconds,
            max_cached_statement_lifetime=0,
            statement_cache_size=0 if is_pooled else 100,
            # The others are set later: PgBouncer refuses those that it does not know.
            server_settings={"application_name": self._url.application_name},
        )
        session.is_pooled = is_pooled
        return session


_UNLESS_POOLED = "SELECT 1 / (pg_backend_pid() = {pid})::int;"


def _set(settings: Mapping[str, str], *, is_local: bool = False) -> str:
    calls = ", ".join(
        f"set_config({_quoted(name)}, {_quoted(value)}, {'true' if is_local else 'false'})"
        for name, value in settings.items()
    )
    return f"SELECT {calls};"


def _quoted(text: str) -> str:
    # As an E'' literal, whatever standard_conforming_strings is.
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _shown(host: tuple[str, int] | None) -> str:
    return "the database" if host is None else f"{host[0]}:{host[1]}"


def _said(trouble: Exception) -> str:
    if isinstance(trouble, asyncpg.TargetServerAttributeNotMatched):
        return "it takes no writes"
    if isinstance(trouble, TimeoutError):
        return "no answer in time"
    return str(trouble)


async def connect_for_migrations(url: str) -> Session:
    """Open one session whose statements take as long as they take: an index over many rows does.

    Raises what ``Sessions.connect`` does.
    """
    sessions = Sessions(url, NO_LIMITS, answer_seconds=None)
    async with asyncio.timeout(ANSWER_SECONDS):
        return await sessions.connect()
