"""``chiffon gateway``: HTTP."""

from typing import Annotated

import typer

app = typer.Typer(
    help="The capacity answers over HTTP, the fleet page, health and metrics.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    pass


@app.command()
def run(
    http_host: Annotated[
        str | None, typer.Option(help="The address to listen on. Default: 127.0.0.1.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Default: 8440; 0 for any.")] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Nobody is asked who they are: mind where it listens."""
    import asyncio

    from chiffon.gateway.process import run as serve
    from chiffon.logs import configure
    from chiffon.settings import load

    settings = load(http_host=http_host, http_port=http_port)
    configure(settings.log_format, settings.log_level)
    asyncio.run(serve(settings))
