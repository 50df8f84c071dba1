"""``chiffon db``: the registry's tables."""

from typing import Annotated

import typer

from chiffon.cli.output import emit, note

app = typer.Typer(help="The registry's tables.", no_args_is_help=True, rich_markup_mode=None)


def _url() -> str:
    from chiffon.settings import load

    return load().database_url.get_secret_value()


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(help="A revision, or head.")] = "head",
) -> None:
    """Bring the tables up to date; twice is the same as once."""
    import asyncio

    from chiffon.registry import migrations

    asyncio.run(migrations.upgrade(_url(), revision))
    note(f"the database is at {revision}")


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="A revision; base removes everything.")],
) -> None:
    """Take the tables back to an older revision. What newer columns held is lost."""
    import asyncio

    from chiffon.registry import migrations

    asyncio.run(migrations.downgrade(_url(), revision))
    note(f"the database is at {revision}")


@app.command()
def current() -> None:
    """Print the revision that the database is at."""
    import asyncio

    from chiffon.registry.registry import Registry

    async def revision() -> str | None:
        async with Registry.open(_url()) as registry:
            return await registry.revision()

    emit(asyncio.run(revision()) or "none")


@app.command()
def check() -> None:
    """Compare the tables with what this chiffon needs. Exit code 3 if they differ."""
    import asyncio

    from chiffon.registry import migrations

    differences = asyncio.run(migrations.differences(_url()))
    if differences is not None:
        note(differences)
        raise typer.Exit(3)
    note("the tables are what this chiffon needs")
