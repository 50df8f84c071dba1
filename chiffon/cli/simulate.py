"""``chiffon simulate``: a fleet of simulated agents, and whether the registry tells the truth."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from chiffon.cli.output import Column, Format, FormatOption, emit, note, show_many, show_one

SHOWN = 20
AGENTS_A_CONNECTION = 150
"""With many more the client library is what is slow: it sends a frame a turn of the loop."""


def simulate(
    agents: Annotated[int, typer.Option(min=1, max=1_000_000)] = 100,
    connections: Annotated[
        int | None, typer.Option(min=1, help="Shared by all agents. Default: one for 150 of them.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long they live.")] = 60.0,
    interval_seconds: Annotated[
        float, typer.Option(min=0.5, max=600.0, help="Between two heartbeats of one agent.")
    ] = 5.0,
    loss: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of heartbeats lost on the way.")
    ] = 0.01,
    duplicates: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share that arrives twice.")
    ] = 0.01,
    reordering: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share that arrives after its successor.")
    ] = 0.02,
    skew_seconds: Annotated[
        float, typer.Option(min=0.0, max=1e6, help="How far clocks are off, either way.")
    ] = 30.0,
    silent: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of agents that become silent half-way.")
    ] = 0.1,
    churn: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share that stops and starts again, a minute."),
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="The same seed: the same agents and fates.")] = 1,
    output: FormatOption = None,
) -> None:
    """Simulate a fleet on a real broker, and compare the registry with what it must hold.

    Needs a running orchestrator, as of `chiffon up`. The simulated agents are in a pool of their
    own, are offered to planners while it runs, and are removed at its end. Exit code 3 if the
    registry or an answer differs from what the agents said.
    """
    import asyncio

    from chiffon.settings import load
    from chiffon.simulate.simulation import Plan, run

    plan = Plan(
        agents=agents,
        connections=connections or -(-agents // AGENTS_A_CONNECTION),
        seconds=seconds,
        interval_seconds=interval_seconds,
        loss=loss,
        duplicates=duplicates,
        reordering=reordering,
        skew_seconds=skew_seconds,
        silent=silent,
        churn=churn,
        seed=seed,
    )
    settings = load()
    note(f"{agents} agents in pool {plan.pool_name}, for {seconds:g} s; planners are offered them")
    outcome = asyncio.run(run(settings, plan, note))
    data = asdict(outcome)
    if output in (Format.json, Format.jsonl):
        emit(json.dumps(data))
    else:
        differences = data.pop("differences")
        show_one(data, output)
        if differences:
            show_many(differences[:SHOWN], DIFFERENCES, output)
    if outcome.differences:
        note(f"{len(outcome.differences)} differences")
        raise typer.Exit(3)
    note("no difference")


DIFFERENCES = [
    Column("WHERE", lambda row: str(row["where"])),
    Column("DIFFERENCE", lambda row: str(row["what"])),
]
