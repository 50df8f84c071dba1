"""``chiffon bus``: what chiffon has on the broker."""

from typing import Annotated

import typer

from chiffon.cli import dead_letters
from chiffon.cli.output import Column, FormatOption, note, show_many
from chiffon.topology import MOST_SHARDS

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

    from chiffon.provisioning import declare as put
    from chiffon.session import dial_any
    from chiffon.settings import load
    from chiffon.topology import Topology

    settings = load()
    url = settings.amqp_url.get_secret_value()

    async def work() -> None:
        session = await dial_any(url, "chiffon bus declare")
        try:
            await put(session, Topology.of(settings.ingest_shards))
        finally:
            await session.close()

    asyncio.run(work())
    note("the topology is on the broker")


@app.command()
def check(output: FormatOption = None) -> None:
    """Compare the broker with the topology. Exit code 3 if something is not as it should be."""
    import asyncio
    from dataclasses import asdict

    from chiffon.provisioning import check as compare
    from chiffon.session import dial_any
    from chiffon.settings import load
    from chiffon.topology import Topology

    settings = load()
    url, wanted = settings.amqp_url.get_secret_value(), Topology.of(settings.ingest_shards)
    findings = asyncio.run(compare(lambda: dial_any(url, "chiffon bus check"), wanted))
    show_many([asdict(finding) for finding in findings], _COLUMNS, output)
    if any(finding.verdict != "ok" for finding in findings):
        raise typer.Exit(3)


@app.command()
def retire(
    shards: Annotated[
        int, typer.Option(min=1, max=MOST_SHARDS, help="How many there were until now.")
    ],
) -> None:
    """Take the queues of another number of shards out of use, and lose nothing.

    First start orchestrators with the new CHIFFON_INGEST_SHARDS, which this needs as well. It then
    unbinds what is left over, waits until the old orchestrators have emptied it and were stopped,
    and deletes it. Stopped and called again, it goes on.
    """
    import asyncio

    from chiffon.resharding import Left, retire_all
    from chiffon.session import dial_any
    from chiffon.settings import load
    from chiffon.topology import Topology

    settings = load()
    url = settings.amqp_url.get_secret_value()

    def tell(left: list[Left]) -> None:
        for one in left:
            if one.messages and not one.consumers:
                wanted = f"start an orchestrator with CHIFFON_INGEST_SHARDS={shards} to empty it"
            elif one.messages:
                wanted = "it is being emptied"
            else:
                wanted = f"stop the orchestrators with CHIFFON_INGEST_SHARDS={shards}"
            note(f"{one.queue}: {one.messages} messages, consumed by {one.consumers}; {wanted}")

    asyncio.run(
        retire_all(
            lambda: dial_any(url, "chiffon bus retire"),
            Topology.of(shards),
            Topology.of(settings.ingest_shards),
            tell,
        )
    )
    note("nothing is left of them")
