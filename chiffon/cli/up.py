"""``chiffon up``: everything on this machine."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from chiffon.cli.columns import FLEET, OFFERS
from chiffon.cli.output import Format, FormatOption, emit, note, show_many

if TYPE_CHECKING:
    from chiffon.embedded.up import Up


def up(
    once: Annotated[
        bool, typer.Option("--once", help="Show that everything works, then stop.")
    ] = False,
    output: FormatOption = None,
) -> None:
    """Run broker, database, orchestrator and this machine's agent until Ctrl-C.

    A RabbitMQ and a PostgreSQL that are installed are started as private instances on free
    ports; CHIFFON_AMQP_URL and CHIFFON_DATABASE_URL name others to use instead.
    """
    import asyncio

    from chiffon.embedded.up import run
    from chiffon.logs import configure_for_command
    from chiffon.settings import load

    # While things start, every one waits for the others; only the outcome is news.
    configure_for_command("ERROR")
    asyncio.run(
        run(
            load(),
            progress=note,
            ready=lambda made: _show(made, output, once),
            once=once,
        )
    )


def _show(made: "Up", output: Format | None, once: bool) -> None:
    from chiffon.capacity.fleet import Agent
    from chiffon.errors import masked

    agents = [Agent.of(row).model_dump(mode="json") for row in made.agents]
    offers = made.offers.model_dump(mode="json")
    urls = {name.removesuffix("_url"): masked(url) for name, url in made.urls.items()}
    if output in (Format.json, Format.jsonl):
        emit(json.dumps({"agents": agents, "offers": offers, "urls": urls}))
        return
    emit("The fleet, as the registry has it:")
    show_many(agents, FLEET, output)
    emit("Offers, as a planner got them over AMQP:")
    show_many(offers["agents"], OFFERS, output)
    emit("Addresses:")
    for name, url in urls.items():
        emit(f"  {name:<12}{url}")
    if not once:
        note("up; Ctrl-C stops it. In another terminal: chiffon fleet list")
