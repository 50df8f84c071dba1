"""``chiffon bus dead-letters``: what was set aside, why, and putting it back."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiffon.cli.output import Column, FormatOption, age, note, show_many, show_one

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from chiffon.dead_letter_box import DeadLetterBox

app = typer.Typer(
    help="Messages that were set aside, with their reasons.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MOST = 10_000

_COLUMNS = [
    Column("LETTER", lambda row: str(row["letter_id"])),
    Column("AGE", lambda row: "?" if row["age_seconds"] is None else age(row["age_seconds"]), True),
    Column("TYPE", lambda row: str(row["message_type"])),
    Column("KEY", lambda row: str(row["routing_key"])),
    Column("BYTES", lambda row: str(row["size_bytes"]), True),
    Column("REASON", lambda row: str(row["reason"])),
]

LettersArgument = Annotated[
    list[str] | None, typer.Argument(help="Their ids, or the beginnings of them.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Every one.")]


@app.command("list")
def list_letters(
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="Most to show.")] = 100,
    output: FormatOption = None,
) -> None:
    """List the oldest dead letters."""

    async def read(box: "DeadLetterBox") -> list[dict[str, Any]]:
        return [letter.data() for letter, _ in await box.read(limit)]

    letters = _with_box(read)
    show_many(letters, _COLUMNS, output)
    if not letters:
        note("no dead letters")


@app.command()
def show(
    letter: Annotated[str, typer.Argument(help="Its id, or the beginning of it.")],
    output: FormatOption = None,
) -> None:
    """Show one dead letter with its body. Exit code 3 if there is none of that id."""
    from chiffon.dead_letter_box import chosen

    async def read(box: "DeadLetterBox") -> list[dict[str, Any]]:
        return [one.data() for one, _ in chosen(await box.read(MOST), [letter])]

    found = _with_box(read)
    if not found:
        note(f"no dead letter {letter}; `chiffon bus dead-letters list` shows them")
        raise typer.Exit(3)
    show_one(found[0], output)


@app.command()
def replay(letters: LettersArgument = None, every: AllOption = False) -> None:
    """Publish letters where they came from, once what was wrong is mended.

    Safe to repeat: what is not newer than the registry changes nothing, and a heartbeat that has
    outlived its lease raises nobody. What is refused again becomes a dead letter again.
    """
    from chiffon.dead_letter_box import chosen

    ids = _ids(letters, every)

    async def put_back(box: "DeadLetterBox") -> int:
        wanted = chosen(await box.read(MOST), ids)
        for letter, message in wanted:
            await box.replay(letter, message)
        return len(wanted)

    _tell("replayed", _with_box(put_back))


@app.command()
def purge(letters: LettersArgument = None, every: AllOption = False) -> None:
    """Delete letters for good."""
    from chiffon.dead_letter_box import chosen

    ids = _ids(letters, every)

    async def take_out(box: "DeadLetterBox") -> int:
        wanted = chosen(await box.read(MOST), ids)
        for _, message in wanted:
            await box.purge(message)
        return len(wanted)

    _tell("purged", _with_box(take_out))


def _ids(letters: list[str] | None, every: bool) -> list[str]:
    if bool(letters) == every:
        raise typer.BadParameter("name letters, or say --all")
    return letters or []


def _tell(done: str, count: int) -> None:
    note(f"{done} {count} dead letter{'' if count == 1 else 's'}")
    if not count:
        raise typer.Exit(3)


def _with_box(work: "Callable[[DeadLetterBox], Awaitable[Any]]") -> Any:
    import asyncio

    from chiffon.dead_letter_box import DeadLetterBox
    from chiffon.session import dial_any
    from chiffon.settings import load

    url = load().amqp_url.get_secret_value()

    async def run() -> Any:
        session = await dial_any(url, "chiffon bus dead-letters")
        try:
            async with DeadLetterBox.opened(session) as box:
                return await work(box)
        finally:
            await session.close()

    return asyncio.run(run())
