"""``chiffon bus``: what chiffon has on the broker."""

import typer

from chiffon.cli import dead_letters
from chiffon.cli.output import Column, FormatOption, note, show_many

app = typer.Typer(
    help="Exchanges, queues and bindings on the broker.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.add_typer(dead_letters.app, name="dead-letters")

_COLUMNS = [
    Column("KIND", lambda row: str(row["kind"])),
    Column("NAME", lambda row: str(row["name"])),
    Column("VERDICT", lambda row: str(row["verdict"])),
    Column("DETAIL", lambda row: str(row["detail"])),
]


@app.command()
def declare() -> None:
    """Declare every exchange, queue and binding; twice is the same as once."""
    import asyncio

    from chiffon.amqp.connection import dial_any
    from chiffon.amqp.declare import declare as put
    from chiffon.contract.topology import Topology
    from chiffon.settings import load

    settings = load()
    url = settings.amqp_url.get_secret_value()

    async def work() -> None:
        connection = await dial_any(url, "chiffon bus declare")
        try:
            await put(connection, Topology.of(settings.ingest_shards))
        finally:
            await connection.close()

    asyncio.run(work())
    note("the topology is on the broker")


@app.command()
def check(output: FormatOption = None) -> None:
    """Compare the broker with the topology. Exit code 3 if something is not as it should be."""
    import asyncio
    from dataclasses import asdict

    from chiffon.amqp.connection import dial_any
    from chiffon.amqp.declare import check as compare
    from chiffon.contract.topology import Topology
    from chiffon.settings import load

    settings = load()
    url, wanted = settings.amqp_url.get_secret_value(), Topology.of(settings.ingest_shards)
    findings = asyncio.run(compare(lambda: dial_any(url, "chiffon bus check"), wanted))
    show_many([asdict(finding) for finding in findings], _COLUMNS, output)
    if any(finding.verdict != "ok" for finding in findings):
        raise typer.Exit(3)
