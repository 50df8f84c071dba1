"""``chiffon agent``: this machine's agent."""

from typing import Annotated
from uuid import UUID

import typer

from chiffon.cli.output import Format, FormatOption, emit, note, show_many

app = typer.Typer(help="This machine's agent.", no_args_is_help=True, rich_markup_mode=None)

PoolOption = Annotated[str | None, typer.Option(help="The group this agent puts itself into.")]
TypeOption = Annotated[
    str | None, typer.Option(help="orchestrator, infra, desktop, code or research.")
]
CapabilitiesOption = Annotated[
    str | None, typer.Option(help="Words that planners may ask for, separated by commas.")
]
IntervalOption = Annotated[float | None, typer.Option(help="Seconds between two heartbeats.")]


@app.command()
def run(
    pool_name: PoolOption = None,
    agent_type: TypeOption = None,
    capabilities: CapabilitiesOption = None,
    heartbeat_interval_seconds: IntervalOption = None,
) -> None:
    """Publish this machine's heartbeats until SIGTERM or Ctrl-C, then say farewell."""
    import asyncio

    from chiffon.agent.process import run as serve
    from chiffon.logs import configure
    from chiffon.settings import load

    settings = load(
        pool_name=pool_name,
        agent_type=agent_type,
        capabilities=capabilities,
        heartbeat_interval_seconds=heartbeat_interval_seconds,
    )
    configure(settings.log_format, settings.log_level)
    asyncio.run(serve(settings))


@app.command()
def probe(
    pool_name: PoolOption = None,
    agent_type: TypeOption = None,
    capabilities: CapabilitiesOption = None,
    heartbeat_interval_seconds: IntervalOption = None,
    output: FormatOption = None,
) -> None:
    """Show the heartbeat that would be sent, and where each value is from. Sends nothing.

    -o json is the exact body.
    """
    import asyncio

    from chiffon.agent.preview import preview
    from chiffon.cli.columns import READINGS, heartbeat_rows
    from chiffon.contract.codec import encode
    from chiffon.settings import load

    options = {
        "pool_name": pool_name,
        "agent_type": agent_type,
        "capabilities": capabilities,
        "heartbeat_interval_seconds": heartbeat_interval_seconds,
    }
    given = {name for name, value in options.items() if value is not None}
    settings = load(**options)
    shown = asyncio.run(preview(settings))
    if output in (Format.json, Format.jsonl):
        emit(encode(shown.update).decode())
        return
    show_many(heartbeat_rows(shown, settings.model_fields_set, given), READINGS, output)
    for line in shown.update.resources.probe_errors if shown.update.resources else []:
        note(f"could not be read: {line}")
    for line in shown.notes:
        note(line)


@app.command()
def tie(
    reservation: Annotated[
        UUID, typer.Argument(metavar="RESERVATION", help="The reservation's id.")
    ],
    processes: Annotated[
        list[int], typer.Argument(metavar="PID...", help="Processes of this host that run now.")
    ],
) -> None:
    """Tell this machine's agent which processes use a reservation.

    What they start belongs to it as well. So their memory is known to be that of the reservation,
    and is not guessed from what became less on the machine.
    """
    from chiffon.probes.jobs import tie as write
    from chiffon.settings import load

    write(load().state_folder, reservation, processes)
    note(f"tied to {reservation}: {', '.join(str(one) for one in processes)}")
