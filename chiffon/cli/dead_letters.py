"""``chiffon bus dead-letters``: what was set aside, why, and putting it back."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiffon.cli.output import Column, FormatOption, age, note, show_many, show_one

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from chiffon.amqp.dead_letter_queue import DeadLetterQueue

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

    async def read(queue: "DeadLetterQueue") -> list[dict[str, Any]]:
        return [letter.data() for letter, _ in await queue.read(limit)]

    letters = _with_queue(read)
    show_many(letters, _COLUMNS, output)
    if not letters:
        note("no dead letters")


@app.command()
def show(
    letter: Annotated[str, typer.Argument(help="Its id, or the beginning of it.")],
    output: FormatOption = None,
) -> None:
    """Show one dead letter with its body. Exit code 3 if there is none of that id."""
    from chiffon.amqp.dead_letter_queue import chosen

    async def read(queue: "DeadLetterQueue") -> list[dict[str, Any]]:
        return [one.data() for one, _ in chosen(await queue.read(MOST), [letter])]

    found = _with_queue(read)
    if not found:
        note(f"no dead letter {letter}; `chiffon bus dead-letters list` shows them")
        raise typer.Exit(3)
    show_one(found[0], output)


@app.command()
def replay(letters: LettersArgument = None, every: AllOption = False) -> None:
    """Publish dead letters where they came from, once what was wrong is mended.

    Safe to repeat: what is not newer than the registry changes nothing, and a heartbeat that has
    outlived its lease makes nobody look alive. What is refused again becomes a dead letter again.
    """
    from chiffon.amqp.dead_letter_queue import chosen

    ids = _ids(letters, every)

    async def put_back(queue: "DeadLetterQueue") -> int:
        wanted = chosen(await queue.read(MOST), ids)
        for letter, message in wanted:
            await queue.replay(letter, message)
        return len(wanted)

    _report("replayed", _with_queue(put_back))


@app.command()
def purge(letters: LettersArgument = None, every: AllOption = False) -> None:
    """Delete dead letters for good."""
    from chiffon.amqp.dead_letter_queue import chosen

    ids = _ids(letters, every)

    async def delete(queue: "DeadLetterQueue") -> int:
        wanted = chosen(await queue.read(MOST), ids)
        for _, message in wanted:
            await queue.purge(message)
        return len(wanted)

    _report("purged", _with_queue(delete))


def _ids(letters: list[str] | None, every: bool) -> list[str]:
    if bool(letters) == every:
        raise typer.BadParameter("name dead letters, or say --all")
    return letters or []


def _report(done: str, count: int) -> None:
    note(f"{done} {count} dead letter{'' if count == 1 else 's'}")
    if not count:
        raise typer.Exit(3)


def _with_queue(work: "Callable[[DeadLetterQueue], Awaitable[Any]]") -> Any:
    import asyncio

    from chiffon.amqp import properties
    from chiffon.amqp.connection import dial_any
    from chiffon.amqp.dead_letter_queue import DeadLetterQueue
    from chiffon.settings import load

    # What cannot be decoded is among what is looked at here.
    properties.install()
    url = load().amqp_url.get_secret_value()

    async def run() -> Any:
        connection = await dial_any(url, "chiffon bus dead-letters")
        try:
            async with DeadLetterQueue.opened(connection) as queue:
                return await work(queue)
        finally:
            await connection.close()

    return asyncio.run(run())
