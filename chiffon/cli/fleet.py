"""``chiffon fleet``: all agents, as the registry has them."""

import os
import re
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from chiffon.cli.columns import FLEET, RESERVED
from chiffon.cli.output import (
    ColumnsOption,
    Format,
    FormatOption,
    Shape,
    WideOption,
    is_terminal,
    note,
    show_many,
    show_one,
)
from chiffon.cli.watch import Data, agents_of, columns_of, follow_events, looks, redraw, stream

if TYPE_CHECKING:
    from chiffon.capacity.fleet import Agent, Fleet
    from chiffon.registry.agents import Agents
    from chiffon.registry.rows import AgentRow


class Status(StrEnum):
    """The states of an agent."""

    online = "online"
    busy = "busy"
    offline = "offline"


app = typer.Typer(
    help="All agents, as the registry has them.", no_args_is_help=True, rich_markup_mode=None
)

StatusOption = Annotated[Status | None, typer.Option(help="Only these.")]
AgentArgument = Annotated[
    str, typer.Argument(help="Its id, as much of it as is nobody else's, or its host name.")
]
PoolOption = Annotated[str | None, typer.Option("--pool-name", "--pool", help="A pool.")]
TypeOption = Annotated[str | None, typer.Option(help="A type.")]


@app.command("list")
def list_agents(
    status: StatusOption = None,
    pool_name: PoolOption = None,
    agent_type: TypeOption = None,
    wide: WideOption = False,
    columns: ColumnsOption = None,
    output: FormatOption = None,
) -> None:
    """List the agents, by pool and host."""
    import asyncio

    from chiffon.capacity.service import OrchestratorService

    async def read() -> "tuple[list[Data], Fleet]":
        async with _registry() as registry:
            fleet = await OrchestratorService(registry).fleet()
            return await agents_of(registry, status, pool_name, agent_type), fleet

    agents, fleet = asyncio.run(read())
    show_many(agents, columns_of(fleet), output, Shape.of(wide, columns))
    if fleet.trouble and agents:
        note(f"degraded: {fleet.trouble}")
    if not agents:
        note("no agent fits" if status or pool_name or agent_type else "no agent is known")


@app.command()
def show(agent: AgentArgument, output: FormatOption = None) -> None:
    """Show all that is known of one agent. Exit code 3 if there is no such agent."""
    import asyncio

    from chiffon.capacity.service import OrchestratorService

    async def read() -> Data:
        async with _registry() as registry:
            found = await OrchestratorService(registry).agent(await registry.agents.named(agent))
            return found.model_dump(mode="json")

    show_one(asyncio.run(read()), output)


@app.command()
def forget(
    agents: Annotated[
        list[str] | None,
        typer.Argument(metavar="[AGENT]...", help="Ids, beginnings of them, host names."),
    ] = None,
    offline_for: Annotated[
        str | None, typer.Option(help="All that are offline for so long: 90s, 30m, 2h, 7d.")
    ] = None,
    pool_name: PoolOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it, and not only show whom.")] = False,
    output: FormatOption = None,
) -> None:
    """Remove agents from the registry. Exit code 3 if one of them is not there.

    An agent that still speaks is back, as a new one, with its next heartbeat. So this also mends
    an id that was in use twice, once only one of the two speaks.

    With --offline-for they are only shown, until --yes is given as well. Those that are drained,
    and on which something is reserved, are kept.
    """
    import asyncio

    if bool(agents) == bool(offline_for) or (agents and pool_name):
        raise typer.BadParameter("name agents, or say --offline-for (and perhaps --pool-name)")
    if offline_for is None:
        asyncio.run(_forget(agents or []))
        return
    seconds = _seconds("--offline-for", offline_for)
    shown = asyncio.run(_forget_offline(seconds, pool_name, is_meant=yes))
    show_many(shown, FLEET, output)
    note(f"forgot {_agents_in_words(len(shown))}" if yes else _preview(len(shown)))


def _preview(count: int) -> str:
    return f"{_agents_in_words(count)} would be forgotten" + ("; --yes does it" if count else "")


def _agents_in_words(count: int) -> str:
    return "1 agent" if count == 1 else f"{count} agents"


async def _forget(names: list[str]) -> None:
    from chiffon.capacity.reservations import ReservationService

    async with _registry() as registry:
        # All are looked up before one is gone: a name that is wrong changes nothing.
        ids = [await registry.agents.named(name) for name in names]
        await ReservationService(registry).forget_agents(ids)
    for agent_id in ids:
        note(f"forgot {agent_id}")


async def _forget_offline(seconds: float, pool_name: str | None, *, is_meant: bool) -> list[Data]:
    """Return who has been offline for so long, and forget them if that is meant."""
    from chiffon.capacity.fleet import Agent

    async with _registry() as registry:
        rows = await registry.agents.long_offline(seconds, pool_name)
        if is_meant:
            forgotten: set[UUID] = set()
            while some := await registry.agents.forget_long_offline(seconds, pool_name):
                forgotten.update(one.agent_id for one in some)
            rows = [row for row in rows if row.agent_id in forgotten]
        return [Agent.of(row).model_dump(mode="json") for row in rows]


@app.command()
def drain(
    agent: AgentArgument,
    reason: Annotated[str | None, typer.Option(help="For people.")] = None,
    deadline: Annotated[
        str | None,
        typer.Option(help="When what is reserved on it is ended: 90s, 30m, 2h. Default: never."),
    ] = None,
    output: FormatOption = None,
) -> None:
    """Give an agent no more offers and reservations; show those it has.

    It stays so, also when it is started anew, until `chiffon fleet undrain`.
    """
    from chiffon.contract.fields import visible

    seconds = None if deadline is None else _seconds("--deadline", deadline)
    said = None if reason is None else visible(reason)
    found = _changed_agent(agent, lambda agents, agent_id: agents.drain(agent_id, said, seconds))
    note(f"{found.hostname or agent} is drained")
    reserved = found.model_dump(mode="json")["reserved"]
    show_many(reserved, RESERVED, output)
    if not reserved:
        note("nothing is reserved on it")
    elif found.drain_deadline is not None:
        note(f"what is left at {found.drain_deadline.isoformat(timespec='seconds')} is ended")


@app.command()
def undrain(agent: AgentArgument) -> None:
    """Offer an agent again."""
    found = _changed_agent(agent, lambda agents, agent_id: agents.undrain(agent_id))
    note(f"{found.hostname or agent} is offered again")


def _changed_agent(
    agent: str, change: "Callable[[Agents, UUID], Awaitable[AgentRow | None]]"
) -> "Agent":
    import asyncio

    from chiffon.capacity.fleet import Agent
    from chiffon.errors import AgentNotFoundError

    async def run() -> Agent:
        async with _registry() as registry:
            agent_id = await registry.agents.named(agent)
            row = await change(registry.agents, agent_id)
            if row is None:
                raise AgentNotFoundError(agent_id)
            return Agent.of(row)

    return asyncio.run(run())


def _seconds(option: str, text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{option}: a number and its unit, such as 90s, 30m, 2h or 1d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2]]


@app.command()
def watch(
    status: StatusOption = None,
    pool_name: PoolOption = None,
    agent_type: TypeOption = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    events: Annotated[
        bool, typer.Option("--events", help="What changes, as it happens, instead of the agents.")
    ] = False,
    wide: WideOption = False,
    columns: ColumnsOption = None,
    output: FormatOption = None,
) -> None:
    """Show the agents and keep showing them until Ctrl-C.

    On a terminal the table is redrawn, below the fleet in numbers. Elsewhere, and with -o jsonl,
    each agent is printed once and again whenever it has changed. With --events it is what the
    orchestrators publish: agents that come, go or become busy, and why; pools of which most
    became silent.
    """
    import asyncio

    if output is Format.json:
        raise typer.BadParameter("watch never ends; use -o jsonl, an object a line")
    if events:
        if status or pool_name or agent_type:
            raise typer.BadParameter("--events takes no filter")
        follow_events(output)
        return
    shape = Shape.of(wide, columns)
    shape.chosen(FLEET)  # what is not a column is said before anything is shown
    can_redraw = is_terminal() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    live = output is not Format.jsonl and can_redraw
    follow = redraw(shape) if live else stream(output, shape)

    async def run() -> None:
        async with _registry() as registry:
            await follow(looks(registry, (status, pool_name, agent_type), interval))

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _registry() -> Any:
    from chiffon.registry.registry import Registry
    from chiffon.settings import load

    return Registry.open(load().database_url.get_secret_value())
