"""``chiffon capacity``: asks over AMQP, as a planner does."""

from typing import TYPE_CHECKING, Annotated, TypeVar
from uuid import UUID

import typer

from chiffon.cli.output import Format, FormatOption, note, show_many, show_one
from chiffon.cli.rows import OFFERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from chiffon.planner import PlannerClient

app = typer.Typer(
    help="Ask what can be taken, over AMQP.", no_args_is_help=True, rich_markup_mode=None
)

Answer = TypeVar("Answer")
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        "--rpc-timeout-seconds",
        min=0.001,
        max=3_600,
        help="Seconds to wait for the answer. Default 5.",
    ),
]


@app.command()
def find(
    min_gpu_vram_gb: Annotated[float, typer.Option(help="Free VRAM, GiB.")] = 0.0,
    min_single_gpu_vram_gb: Annotated[float, typer.Option(help="Free VRAM on one GPU, GiB.")] = 0.0,
    min_cpu_cores: Annotated[int, typer.Option(help="Free whole cores.")] = 1,
    min_memory_gb: Annotated[float, typer.Option(help="Free memory, GiB.")] = 0.0,
    agent_type: Annotated[str, typer.Option(help="A type, or any.")] = "desktop",
    pool_name: Annotated[str | None, typer.Option(help="A pool.")] = None,
    gpu_type: Annotated[str | None, typer.Option(help="nvidia, amd, intel or none.")] = None,
    capabilities: Annotated[
        list[str] | None, typer.Option(help="A word the agent must have; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Most offers, 1 to 1000.")] = 100,
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """Show which agents can take a job now, best first. Exit code 3 if none can."""
    from pydantic import ValidationError

    from chiffon.encoding import first_problem
    from chiffon.messages import CapacityQuery

    try:
        query = CapacityQuery.model_validate(
            {
                "min_gpu_vram_gb": min_gpu_vram_gb,
                "min_single_gpu_vram_gb": min_single_gpu_vram_gb,
                "min_cpu_cores": min_cpu_cores,
                "min_memory_gb": min_memory_gb,
                "agent_type": None if agent_type == "any" else agent_type,
                "pool_name": pool_name,
                "gpu_type": gpu_type,
                "capabilities": capabilities or [],
                "limit": limit,
            }
        )
    except ValidationError as error:
        field, _, problem = first_problem(error).partition(":")
        option = f"--{field.partition('.')[0].replace('_', '-')}"
        raise typer.BadParameter(f"{option}:{problem}") from None
    offers = _ask(lambda planner, seconds: planner.find(query, timeout=seconds), timeout)
    answer = offers.model_dump(mode="json")
    if output is Format.json:
        show_one(answer, output)
    else:
        show_many(answer["agents"], OFFERS, output)
    if offers.degraded:
        note("degraded: the registry's view is incomplete now; agents may be missing")
    if offers.total_relation == "gte":
        note(f"more than {len(offers.agents)} agents fit; --limit shows more")
    if not offers.agents:
        note("no agent can take this now")
        raise typer.Exit(3)


@app.command()
def show(
    agent: Annotated[UUID, typer.Argument(help="The agent's id.")],
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """Show what one agent last reported. Exit code 3 if there is no such agent."""
    answer = _ask(lambda planner, seconds: planner.show(agent, timeout=seconds), timeout)
    show_one(answer.model_dump(mode="json"), output)


def _ask(
    question: "Callable[[PlannerClient, float], Awaitable[Answer]]", timeout: float | None
) -> Answer:
    import asyncio

    from chiffon.planner import PlannerClient
    from chiffon.settings import load

    settings = load(rpc_timeout_seconds=timeout)

    async def ask() -> Answer:
        url = settings.amqp_url.get_secret_value()
        async with PlannerClient.open(url, name="chiffon capacity") as planner:
            return await question(planner, settings.rpc_timeout_seconds)

    return asyncio.run(ask())
