"""``chiffon capacity``: asks over AMQP, as a planner does."""

from typing import TYPE_CHECKING, Annotated
from uuid import UUID, uuid4

import typer

from chiffon.cli import needs
from chiffon.cli.columns import OFFERS, OFFERS_AS_REPORTED
from chiffon.cli.needs import TimeoutOption, ask, question
from chiffon.cli.output import (
    ColumnsOption,
    Format,
    FormatOption,
    Shape,
    WideOption,
    note,
    show_many,
    show_one,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiffon.contract.messages import CapacityOffers, CapacityQuery, Explanation

app = typer.Typer(
    help="Ask what can be taken, wait for it and take it, over AMQP.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def find(
    min_gpu_vram_gb: needs.MinGpuVram = 0.0,
    min_single_gpu_vram_gb: needs.MinSingleGpuVram = 0.0,
    min_cpu_cores: needs.MinCpuCores = 1,
    min_memory_gb: needs.MinMemory = 0.0,
    agent_type: needs.AgentType = "desktop",
    pool_name: needs.PoolName = None,
    gpu_type: needs.GpuType = None,
    capabilities: needs.Capabilities = None,
    limit: Annotated[int, typer.Option(help="Most offers, 1 to 1000.")] = 100,
    explain: Annotated[
        bool, typer.Option("--explain", help="Why the other agents are no offers.")
    ] = False,
    show_reserved: Annotated[
        bool, typer.Option("--show-reserved", help="Also what is free before what is reserved.")
    ] = False,
    timeout: TimeoutOption = None,
    wide: WideOption = False,
    columns: ColumnsOption = None,
    output: FormatOption = None,
) -> None:
    """Show which agents can take a job now, best first. Exit code 3 if none can."""
    from chiffon.contract.messages import CapacityQuery

    query = question(
        CapacityQuery,
        min_gpu_vram_gb=min_gpu_vram_gb,
        min_single_gpu_vram_gb=min_single_gpu_vram_gb,
        min_cpu_cores=min_cpu_cores,
        min_memory_gb=min_memory_gb,
        agent_type=agent_type,
        pool_name=pool_name,
        gpu_type=gpu_type,
        capabilities=capabilities,
        limit=limit,
        explain=explain,
        show_reserved=show_reserved,
    )
    offers = ask(lambda planner, seconds: planner.find(query, timeout=seconds), timeout)
    _show_offers(offers, output, Shape.of(wide, columns), show_reserved)
    if not offers.agents:
        note("no agent can take this now" + ("" if explain else "; --explain says why"))
        if query.agent_type is not None and not explain:
            _tell_of_other_types(query, timeout)
        raise typer.Exit(3)


def _tell_of_other_types(query: "CapacityQuery", timeout: float | None) -> None:
    """Say whether the filter for a type alone is why there is no offer: its default is one."""
    wider = query.model_copy(update={"agent_type": None, "limit": 1_000})
    found = ask(lambda planner, seconds: planner.find(wider, timeout=seconds), timeout).agents
    if found:
        types = ", ".join(sorted({one.agent_type for one in found}))
        note(
            f"{len(found)} of other types can ({types}), and only {query.agent_type} was asked "
            "for: type --agent-type any"
        )


@app.command()
def wait(
    min_gpu_vram_gb: needs.MinGpuVram = 0.0,
    min_single_gpu_vram_gb: needs.MinSingleGpuVram = 0.0,
    min_cpu_cores: needs.MinCpuCores = 1,
    min_memory_gb: needs.MinMemory = 0.0,
    agent_type: needs.AgentType = "desktop",
    pool_name: needs.PoolName = None,
    gpu_type: needs.GpuType = None,
    capabilities: needs.Capabilities = None,
    limit: Annotated[int, typer.Option(help="Most offers, 1 to 1000.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for room.")] = 600.0,
    wide: WideOption = False,
    columns: ColumnsOption = None,
    output: FormatOption = None,
) -> None:
    """Wait in the queue until an agent can take a job. Exit code 3 if none could in time."""
    from chiffon.contract.messages import CapacityWait

    wanted = question(
        CapacityWait,
        min_gpu_vram_gb=min_gpu_vram_gb,
        min_single_gpu_vram_gb=min_single_gpu_vram_gb,
        min_cpu_cores=min_cpu_cores,
        min_memory_gb=min_memory_gb,
        agent_type=agent_type,
        pool_name=pool_name,
        gpu_type=gpu_type,
        capabilities=capabilities,
        limit=limit,
        explain=True,
        timeout_seconds=timeout,
    )
    offers = ask(lambda planner, _: planner.wait(wanted), None)
    if offers.agents:
        offers = offers.model_copy(update={"explanation": None})
    _show_offers(offers, output, Shape.of(wide, columns))
    if not offers.agents:
        note(f"no agent could take this within {timeout:g} s")
        raise typer.Exit(3)


@app.command()
def reserve(
    holder: Annotated[str | None, typer.Option(help="Who holds it. Default: user@host.")] = None,
    gpu_vram_gb: Annotated[float, typer.Option(help="GiB on each GPU.")] = 0.0,
    gpus: Annotated[int, typer.Option(help="On so many GPUs of an agent.")] = 1,
    cpu_cores: Annotated[int, typer.Option(help="Whole cores.")] = 0,
    memory_gb: Annotated[float, typer.Option(help="GiB of memory.")] = 0.0,
    count: Annotated[int, typer.Option(help="On so many agents, or on none.")] = 1,
    distinct_hosts: Annotated[
        bool, typer.Option("--distinct-hosts", help="No two of the agents on one host.")
    ] = False,
    agent_id: Annotated[UUID | None, typer.Option(help="On this agent.")] = None,
    lease_seconds: Annotated[float, typer.Option(help="It ends unless renewed by then.")] = 60.0,
    idempotency_key: Annotated[
        UUID | None, typer.Option(help="The same key gives the same reservation.")
    ] = None,
    alternatives: Annotated[
        list[str] | None,
        typer.Option("--alternative", help="JSON of what is different; may be repeated."),
    ] = None,
    min_gpu_vram_gb: needs.MinGpuVram = 0.0,
    min_single_gpu_vram_gb: needs.MinSingleGpuVram = 0.0,
    min_cpu_cores: needs.MinCpuCores = 1,
    min_memory_gb: needs.MinMemory = 0.0,
    agent_type: needs.AgentType = "desktop",
    pool_name: needs.PoolName = None,
    gpu_type: needs.GpuType = None,
    capabilities: needs.Capabilities = None,
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """Take room on the best agent. Exit code 3 if nobody has it, and why.

    It ends with its lease: `chiffon reservation renew` lets that begin anew, `chiffon reservation
    release` gives the room back.
    """
    from chiffon.contract.messages import CapacityReserve
    from chiffon.errors import InsufficientCapacity

    request = question(
        CapacityReserve,
        holder=_somebody() if holder is None else holder,
        idempotency_key=idempotency_key or uuid4(),
        lease_seconds=lease_seconds,
        gpu_vram_gb=gpu_vram_gb,
        cpu_cores=cpu_cores,
        memory_gb=memory_gb,
        gpus=gpus,
        count=count,
        distinct_hosts=distinct_hosts,
        agent_id=agent_id,
        alternatives=[_object(text) for text in alternatives or []],
        min_gpu_vram_gb=min_gpu_vram_gb,
        min_single_gpu_vram_gb=min_single_gpu_vram_gb,
        min_cpu_cores=min_cpu_cores,
        min_memory_gb=min_memory_gb,
        agent_type=agent_type,
        pool_name=pool_name,
        gpu_type=gpu_type,
        capabilities=capabilities,
    )
    try:
        made = ask(lambda planner, seconds: planner.reserve_once(request, timeout=seconds), timeout)
    except InsufficientCapacity as refused:
        relaxation = (refused.details.get("explanation") or {}).get("relaxation") or {}
        options = _options(relaxation.get("changes") or {})
        if not options:
            raise
        raise InsufficientCapacity(
            refused.code, f"{refused.message}: type {options}", refused.details
        ) from None
    show_one(made.model_dump(mode="json"), output)
    if made.state != "held":
        note(f"this key's reservation is over: {made.reason}; a new intent needs a new key")
        raise typer.Exit(3)


@app.command()
def show(
    agent: Annotated[UUID, typer.Argument(help="The agent's id.")],
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """Show what one agent last reported. Exit code 3 if there is no such agent."""
    answer = ask(lambda planner, seconds: planner.show(agent, timeout=seconds), timeout)
    show_one(answer.model_dump(mode="json"), output)


def _show_offers(
    offers: "CapacityOffers", output: Format | None, shape: Shape, show_reserved: bool = False
) -> None:
    answer = offers.model_dump(mode="json")
    if output is Format.json:
        show_one(answer, output)
    else:
        columns = OFFERS_AS_REPORTED if show_reserved else OFFERS
        show_many(answer["agents"], columns, output, shape)
    if offers.degraded:
        note("degraded: the registry's view is incomplete now; agents may be missing")
    if offers.total_relation == "gte":
        note(f"more than {len(offers.agents)} agents fit; --limit shows more")
    if offers.explanation is not None:
        _explain(offers.explanation)


def _explain(explanation: "Explanation") -> None:
    note(explanation.summary)
    if explanation.relaxation is not None:
        note(explanation.relaxation.message)
        note(f"type {_options(explanation.relaxation.changes)}")


def _options(changes: "Mapping[str, object]") -> str:
    """Return what to type for it."""
    options = []
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        if value is None:
            options.append(f"{option} any" if name == "agent_type" else f"no {option}")
        elif isinstance(value, list):
            options += [f"{option} {one}" for one in value] or [f"no {option}"]
        elif isinstance(value, bool):
            options.append(option if value else f"no {option}")
        else:
            shown = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            options.append(f"{option} {shown}")
    return ", ".join(options)


def _somebody() -> str:
    import getpass
    import socket

    from chiffon.contract.fields import visible

    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return visible(f"{user}@{socket.gethostname()}")


def _object(text: str) -> object:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--alternative: not JSON: {error}") from None
