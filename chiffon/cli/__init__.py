"""The command line: one file a command group.

Commands import what they need when they run, so that ``--help`` and completion answer at once.
Data goes to standard output, everything else to standard error.
"""

from typing import Annotated

import typer

from chiffon import __version__
from chiffon.cli import (
    agent,
    bus,
    capacity,
    db,
    fleet,
    gateway,
    orchestrator,
    output,
    reservation,
    schema,
    simulate,
    up,
)

app = typer.Typer(
    name="chiffon",
    help="Which of your machines can take a job right now, over the RabbitMQ you already run.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("simulate")(simulate.simulate)
app.add_typer(agent.app, name="agent")
app.add_typer(orchestrator.app, name="orchestrator")
app.add_typer(gateway.app, name="gateway")
app.add_typer(fleet.app, name="fleet")
app.add_typer(capacity.app, name="capacity")
app.add_typer(reservation.app, name="reservation")
app.add_typer(db.app, name="db")
app.add_typer(bus.app, name="bus")
app.add_typer(schema.app, name="schema")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chiffon {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> int:
    """Run one command; returns the exit code.

    0 ok, 1 a bug, 2 usage, 3 a negative answer, 69 not reachable, 75 try again, 77 access
    refused, 78 bad configuration.
    """
    from chiffon.errors import ChiffonError, NotInstalled, NotWritten, exit_code, masked
    from chiffon.logs import configure_for_command

    output.prepare()
    configure_for_command()
    try:
        app()
    except ChiffonError as error:
        output.note(f"chiffon: {masked(str(error))}")
        return exit_code(error)
    except ModuleNotFoundError as error:
        missing = NotInstalled.of(error)
        if missing is None:
            raise
        output.note(f"chiffon: this command needs more: {missing}")
        return exit_code(missing)
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except OSError as error:
        # Of click, which prints help and usage: all that we print ourselves is caught there.
        if error.errno not in output.UNWRITABLE:
            raise
        output.abandon()
        return exit_code(NotWritten())
    return 0
