"""``chiffon schema``: the contract for programs."""

import typer

from chiffon.cli.output import emit

app = typer.Typer(
    help="The wire contract, for programs.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    pass


@app.command()
def openapi() -> None:
    """Print the OpenAPI description of the gateway."""
    import json

    from chiffon.gateway.app import openapi

    emit(json.dumps(openapi(), indent=2))


@app.command()
def jsonschema() -> None:
    """Print the JSON Schema of every message."""
    import json

    from chiffon.contract.codec import json_schema

    emit(json.dumps(json_schema(), indent=2))
