"""The options for what an agent must have, which several commands take, and asking over AMQP."""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import BaseModel

    from chiffon.planner.client import PlannerClient

Answer = TypeVar("Answer")
Question = TypeVar("Question", bound="BaseModel")

MinGpuVram = Annotated[float, typer.Option(help="Free VRAM, GiB.")]
MinSingleGpuVram = Annotated[float, typer.Option(help="Free VRAM on one GPU, GiB.")]
MinCpuCores = Annotated[int, typer.Option(help="Free whole cores.")]
MinMemory = Annotated[float, typer.Option(help="Free memory, GiB.")]
AgentType = Annotated[str, typer.Option(help="A type, or any.")]
PoolName = Annotated[str | None, typer.Option(help="A pool.")]
GpuType = Annotated[str | None, typer.Option(help="nvidia, amd, intel or none.")]
Capabilities = Annotated[
    list[str] | None, typer.Option(help="A word the agent must have; may be repeated.")
]
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


def question(kind: "type[Question]", **given: Any) -> "Question":
    """Return a question of the contract from the options of the same names.

    Raises:
        typer.BadParameter: One does not fit; the message names the option.
    """
    from pydantic import ValidationError

    from chiffon.contract.codec import first_problem

    if given.get("agent_type") == "any":
        given["agent_type"] = None
    if "capabilities" in given:
        given["capabilities"] = given["capabilities"] or []
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        field, _, problem = first_problem(error).partition(":")
        if not problem:
            raise typer.BadParameter(field) from None
        option = f"--{field.partition('.')[0].replace('_', '-')}"
        raise typer.BadParameter(f"{option}:{problem}") from None


def ask(
    question: "Callable[[PlannerClient, float], Awaitable[Answer]]", timeout: float | None
) -> Answer:
    """Ask over AMQP, as a planner does.

    Args:
        question: What is asked, within so many seconds.
        timeout: Seconds for the answer; ``None`` for the setting.
    """
    import asyncio

    from chiffon.planner.client import PlannerClient
    from chiffon.settings import load

    settings = load(rpc_timeout_seconds=timeout)

    async def run() -> Answer:
        url = settings.amqp_url.get_secret_value()
        async with PlannerClient.open(url, name="chiffon capacity") as planner:
            return await question(planner, settings.rpc_timeout_seconds)

    return asyncio.run(run())
