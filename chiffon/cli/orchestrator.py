"""``chiffon orchestrator``: ingest, sweeper and responder."""

from typing import Annotated

import typer

app = typer.Typer(
    help="Records heartbeats, marks the silent offline, answers planners.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    pass


@app.command()
def run(
    ingest_batch_size: Annotated[
        int | None, typer.Option(help="Messages that are worth a commit at once.")
    ] = None,
    ingest_batch_seconds: Annotated[
        float | None, typer.Option(help="How long a message waits for others.")
    ] = None,
    sweep_interval_seconds: Annotated[
        float | None, typer.Option(help="Seconds between two sweeps.")
    ] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; any number may run on one broker and database."""
    import asyncio

    from chiffon.logs import configure
    from chiffon.orchestrator.process import run as serve
    from chiffon.settings import load

    settings = load(
        ingest_batch_size=ingest_batch_size,
        ingest_batch_seconds=ingest_batch_seconds,
        sweep_interval_seconds=sweep_interval_seconds,
    )
    configure(settings.log_format, settings.log_level)
    asyncio.run(serve(settings))
