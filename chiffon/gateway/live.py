"""The fleet as it changes, for those who watch the page.

One look at the registry serves all who follow: which rows are new versions, which are gone. Only
those are read and sent on. Followers that are too slow are let go; their browser comes back and
starts from the whole fleet again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from pydantic_core import to_json

from chiffon.capacity.fleet import Fleet
from chiffon.capacity.room import room
from chiffon.errors import RegistryRefused, RegistryUnavailable, TablesMissing
from chiffon.gateway.history import History
from chiffon.logs import Trouble
from chiffon.registry.registry import Registry
from chiffon.registry.rows import AgentRow

log = logging.getLogger(__name__)

FOLLOWED_SECONDS = 1.0
"""Between two looks while somebody follows."""

ALONE_SECONDS = 5.0
ALONE_SHARE = 0.1
"""Between two looks while nobody does, for the history; and of the time, where they are long."""

MOST_WAITING = 10
"""Looks that one follower has not taken yet, who is let go if there are more."""

AT_ONCE_AGENTS = 200
"""Read, or sent, before others have their turn."""


class Live:
    """Looks at the registry again and again, and sends followers what changed.

    Args:
        registry: Where the fleet is.
        history: Notes every row that is read.
    """

    def __init__(self, registry: Registry, history: History) -> None:
        self._registry = registry
        self._history = history
        self._versions: dict[UUID, str] = {}
        self._rows: dict[UUID, dict[str, Any]] = {}
        self._untold: dict[UUID, dict[str, Any]] = {}
        self._summary: dict[str, Any] | None = None
        self._read = 0.0
        self._trouble: str | None = "The fleet has not been read yet."
        self._followers: set[asyncio.Queue[bytes | None]] = set()
        self._followed = asyncio.Event()
        self._is_closed = False

    @property
    def followers(self) -> int:
        """How many follow now."""
        return len(self._followers)

    async def run(self) -> None:
        """Look until cancelled; followers learn that the database is away."""
        lasting = Trouble()
        while True:
            began = time.monotonic()
            try:
                await self._look()
                self._trouble = None
            except RegistryUnavailable as error:
                if lasting.is_news(str(error)):
                    log.warning("the page shows old data: %s", error)
                self._trouble = _in_words(error)
                self._tell(_event("trouble", self._trouble))
            except Exception:
                log.exception("looking at the registry failed in an unforeseen way")
                self._trouble = "The gateway failed; see its log."
                self._tell(_event("trouble", self._trouble))
            await self._pause(time.monotonic() - began)

    def close(self) -> None:
        """Let all followers go, as the gateway stops."""
        self._is_closed = True
        for queue in list(self._followers):
            self._let_go(queue)

    async def follow(self) -> AsyncIterator[bytes]:
        """Yield server-sent events: the whole fleet, and then what changes, until let go."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MOST_WAITING)
        whole = self._whole(list(self._rows.values()))
        self._followers.add(queue)
        self._followed.set()
        try:
            for event in whole:
                yield event
                await asyncio.sleep(0)
            while not self._is_closed and (news := await queue.get()) is not None:
                yield news
        finally:
            self._followers.discard(queue)

    async def _pause(self, took_seconds: float) -> None:
        # A look that took long is followed by a pause that is no shorter.
        if self._followers:
            await asyncio.sleep(max(FOLLOWED_SECONDS - took_seconds, took_seconds, 0.1))
            return
        self._followed.clear()
        try:
            async with asyncio.timeout(max(ALONE_SECONDS, took_seconds / ALONE_SHARE)):
                await self._followed.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        began = time.monotonic()
        versions = await self._registry.agents.versions()
        # In a thread, and rows some at a time: who asks a question meanwhile must not wait for all.
        gone, changed = await asyncio.to_thread(_compared, self._versions, versions)
        for start in range(0, len(changed), AT_ONCE_AGENTS):
            rows = await self._registry.agents.show_many(changed[start : start + AT_ONCE_AGENTS])
            read = time.monotonic()
            self._history.note(rows)
            part = {row.agent_id: _compact(row, read) for row in rows}
            # At once: what is read need not be read again if the rest fails.
            self._rows.update(part)
            self._untold.update(part)
            self._versions.update((agent_id, versions[agent_id]) for agent_id in part)
        summary = Fleet.of(await self._registry.agents.summary()).model_dump(mode="json")
        self._history.forget(gone)
        for agent_id in gone:
            self._rows.pop(agent_id, None)
            self._untold.pop(agent_id, None)
        self._versions, self._summary, self._read = versions, summary, began
        fresh, self._untold = list(self._untold.values()), {}
        if self._followers:
            events = [self._numbers()]
            for event in _chunks(fresh):
                events.append(event)
                await asyncio.sleep(0)
            if gone:
                events.append(_event("gone", [str(agent_id) for agent_id in gone]))
            self._tell(b"".join(events))

    def _whole(self, rows: Sequence[dict[str, Any]]) -> Iterable[bytes]:
        yield _event("restart", None)
        if self._summary is not None:
            yield self._numbers()
            yield from _chunks(rows)
        if self._trouble is not None:
            yield _event("trouble", self._trouble)

    def _numbers(self) -> bytes:
        """Return the fleet in numbers, with how long ago the look at it began."""
        return _event("fleet", {**(self._summary or {}), "age": time.monotonic() - self._read})

    def _tell(self, events: bytes) -> None:
        for queue in list(self._followers):
            try:
                queue.put_nowait(events)
            except asyncio.QueueFull:
                log.info("a page that is too slow is let go")
                self._let_go(queue)

    def _let_go(self, queue: "asyncio.Queue[bytes | None]") -> None:
        self._followers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)


def _in_words(error: RegistryUnavailable) -> str:
    """Return what is wrong with the database, for those who look at the page; the log has more."""
    match error:
        case RegistryRefused():
            return "The database refuses the gateway: wrong user, password or rights."
        case TablesMissing():
            return f"The database cannot be used: {error}."
    return "The gateway cannot reach the database."


def _compared(before: Mapping[UUID, str], now: Mapping[UUID, str]) -> tuple[list[UUID], list[UUID]]:
    """Return which agents are gone, and of which there is another version."""
    gone = [agent_id for agent_id in before if agent_id not in now]
    return gone, [agent_id for agent_id, mark in now.items() if before.get(agent_id) != mark]


def _compact(row: AgentRow, read: float) -> dict[str, Any]:
    # Others may have written the row: only what is of the contract's types goes on.
    metrics = row.resource_metrics if isinstance(row.resource_metrics, dict) else {}
    if row.reserved:
        left = room(metrics, row.reserved).available
        metrics = {
            **metrics,
            # What is unknown stays so: nobody knows what is left of it.
            **{
                name: value
                for name, value in (
                    ("gpu_vram_available_gb", left.vram_gb),
                    ("cpu_cores_available", left.cores),
                    ("memory_available_gb", left.memory_gb),
                )
                if _number(metrics.get(name)) is not None
            },
        }
    gpu_type = metrics.get("gpu_type")
    return {
        "id": str(row.agent_id),
        "host": row.hostname,
        "pool": row.pool_name,
        "type": row.agent_type,
        "status": row.status,
        "reason": row.status_reason,
        "drained": row.drained,
        "lease": row.lease_seconds,
        "silent": row.is_silent,
        "heard": None if row.age_seconds is None else read - row.age_seconds,
        "gpu": gpu_type if isinstance(gpu_type, str) else None,
        "gpus": sorted({str(gpu.get("name") or "?") for gpu in _listed(metrics, "gpus", dict)}),
        "problems": _listed(metrics, "probe_errors", str),
        **{short: _number(metrics.get(name)) for short, name in _NUMBERS.items()},
    }


def _listed(metrics: dict[str, Any], name: str, kind: type[Any]) -> list[Any]:
    values = metrics.get(name)
    return [one for one in values if isinstance(one, kind)] if isinstance(values, list) else []


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


_NUMBERS = {
    "cpu": "cpu_percent",
    "cores": "cpu_cores_available",
    "memory": "memory_available_gb",
    "memory_used": "memory_percent",
    "vram": "gpu_vram_available_gb",
    "vram_total": "gpu_vram_total_gb",
}


def _chunks(rows: Sequence[dict[str, Any]]) -> Iterable[bytes]:
    """Yield rows as events; instead of when an agent was heard of, how long ago that is."""
    for start in range(0, len(rows), AT_ONCE_AGENTS):
        now = time.monotonic()
        yield _event("agents", [_aged(row, now) for row in rows[start : start + AT_ONCE_AGENTS]])


def _aged(row: dict[str, Any], now: float) -> dict[str, Any]:
    aged = {**row, "age": None if row["heard"] is None else max(now - row["heard"], 0.0)}
    del aged["heard"]
    return aged


def _event(name: str, data: Any) -> bytes:
    # Whatever a row holds, a number that JSON does not have must not end everybody's page.
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(data, inf_nan_mode="null"))
