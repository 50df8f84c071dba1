"""What ``chiffon fleet watch`` shows, and how it keeps showing it."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from chiffon.cli.columns import EVENTS, FLEET, FLEET_LAST_KNOWN
from chiffon.cli.output import Column, Format, Shape, age, emit, fitting, note, print_plain

if TYPE_CHECKING:
    from chiffon.capacity.fleet import Fleet
    from chiffon.registry.registry import Registry

Data = dict[str, Any]


def follow_events(output: Format | None) -> None:
    """Print what changes, as it is published, until Ctrl-C."""
    import asyncio

    from chiffon.planner.events import following
    from chiffon.settings import load

    async def run() -> None:
        url = load().amqp_url.get_secret_value()
        async with following(url, name="chiffon fleet watch") as events:
            if output is not Format.jsonl:
                print_plain([[column.title for column in EVENTS]])
            async for event in events:
                row = event.model_dump(mode="json")
                if output is Format.jsonl:
                    emit(json.dumps(row))
                else:
                    print_plain([[column.cell(row) for column in EVENTS]])

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@dataclass(frozen=True)
class Look:
    """The agents that fit the filters, and the whole fleet in numbers."""

    agents: list[Data]
    fleet: "Fleet"


async def looks(
    registry: "Registry", filters: tuple[str | None, str | None, str | None], interval: float
) -> AsyncIterator[Look | str]:
    """Yield the fleet again and again; while the database is away, what is wrong with it."""
    import asyncio

    from chiffon.capacity.service import OrchestratorService
    from chiffon.errors import RegistryRefused, RegistryUnavailable

    while True:
        try:
            fleet = await OrchestratorService(registry).fleet()
            yield Look(await agents_of(registry, *filters), fleet)
        except RegistryRefused:
            raise
        except RegistryUnavailable as error:
            yield str(error)
        await asyncio.sleep(interval)


def redraw(shape: Shape) -> Callable[[AsyncIterator[Look | str]], Any]:
    """Return what draws each look over the last one, on a terminal."""
    return lambda looks: _redrawn(looks, shape)


async def _redrawn(looks: AsyncIterator[Look | str], shape: Shape) -> None:
    import time

    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    last: Look | None = None
    looked_at = 0.0
    with Live(auto_refresh=False, screen=True) as display:
        async for look in looks:
            if isinstance(look, Look):
                last, looked_at, trouble = look, time.monotonic(), ""
            else:
                trouble = look
            seconds = time.monotonic() - looked_at
            shown: list[RenderableType] = [
                Text(headline(last.fleet, seconds, trouble) if last else trouble)
            ]
            if last is not None:
                chosen = shape.chosen(columns_of(last.fleet))
                shown.append(fitting(last.agents, chosen, display.console.width, shape))
            display.update(Group(*shown), refresh=True)


def headline(fleet: "Fleet", seconds: float, trouble: str) -> str:
    """Return the fleet in numbers, in one line.

    Args:
        fleet: The numbers.
        seconds: How old they are.
        trouble: Why they are no newer; empty if they are new.
    """
    counts = [f"{getattr(fleet, name)} {name}" for name in ("online", "busy", "offline")]
    if fleet.silent:
        counts.append(f"{fleet.silent} silent")
    if fleet.reservations:
        counts.append(f"{fleet.reservations} reserved")
    if fleet.waiting:
        counts.append(f"{fleet.waiting} waiting")
    words = [", ".join(counts)]
    if fleet.trouble:
        words.append(f"degraded: {fleet.trouble}")
    if trouble:
        words.append(f"{age(seconds)} old: {trouble}")
    return "; ".join(words)


def stream(output: Format | None, shape: Shape) -> Callable[[AsyncIterator[Look | str]], Any]:
    """Return what prints each agent once, and again whenever it has changed."""

    def line(agent: Data, fleet: "Fleet") -> None:
        if output is Format.jsonl:
            emit(json.dumps(agent))
        else:
            print_plain([[column.cell(agent) for column in shape.chosen(columns_of(fleet))]])

    async def follow(looks: AsyncIterator[Look | str]) -> None:
        if output is not Format.jsonl:
            print_plain([[column.title for column in shape.chosen(FLEET)]])
        seen: dict[str, tuple[Any, ...]] = {}
        async for look in looks:
            if isinstance(look, str):
                note(f"{look}; trying again")
            else:
                for agent in _changed(look.agents, seen):
                    line(agent, look.fleet)

    return follow


def _changed(agents: list[Data], seen: dict[str, tuple[Any, ...]]) -> Iterator[Data]:
    """Yield the agents that are not as they were ``seen``, and note how they are."""
    for agent in agents:
        state = (agent["status"], agent["is_silent"], agent["last_heartbeat_at"])
        if seen.get(agent["agent_id"]) != state:
            seen[agent["agent_id"]] = state
            yield agent


def columns_of(fleet: "Fleet") -> list[Column]:
    """Return the columns of the agents: while nothing is recorded, without who is silent."""
    return FLEET if fleet.is_recording else FLEET_LAST_KNOWN


async def agents_of(
    registry: "Registry", status: str | None, pool_name: str | None, agent_type: str | None
) -> list[Data]:
    """Return the agents that fit the filters, by pool and host."""
    from chiffon.capacity.fleet import Agent
    from chiffon.contract.fields import visible

    names = (None if name is None else visible(name) for name in (pool_name, agent_type))
    rows = await registry.agents.list(status, *names)
    return [Agent.of(row).model_dump(mode="json") for row in rows]
