"""``chiffon relay``: what many agents dial instead of the broker."""

from typing import Annotated

import typer

app = typer.Typer(
    help="Takes the heartbeats of many agents over one connection to the broker.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    pass


@app.command()
def run(
    relay_host: Annotated[str | None, typer.Option(help="Where to listen for agents.")] = None,
    relay_port: Annotated[int | None, typer.Option(help="On which port; 0 for any.")] = None,
    relay_seconds: Annotated[
        float | None, typer.Option(help="For how long heartbeats are gathered.")
    ] = None,
) -> None:
    """Forward the heartbeats of all agents that dial it, until SIGTERM or Ctrl-C.

    Agents are pointed at it by their CHIFFON_AMQP_URL: amqp://HOST:5673/
    """
    import asyncio

    from chiffon.logs import configure
    from chiffon.relay import run as serve
    from chiffon.settings import load

    settings = load(relay_host=relay_host, relay_port=relay_port, relay_seconds=relay_seconds)
    configure(settings.log_format, settings.log_level)
    asyncio.run(serve(settings))
