"""How answers are printed: a table for people, JSON or tab-separated text for programs.

The same data in every form. Tables are for a terminal; elsewhere a table is tab-separated text
that is never cut.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


class Format(StrEnum):
    """The forms that ``-o`` names."""

    table = "table"
    json = "json"
    jsonl = "jsonl"


FormatOption = Annotated[
    Format | None,
    typer.Option(
        "-o",
        "--output",
        help="table, json or jsonl (an object a line). "
        "Default: a table on a terminal, tab-separated text elsewhere.",
    ),
]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        title: Its heading.
        cell: Makes the text for a person from a row.
        is_number: Whether to align to the right.
    """

    title: str
    cell: Callable[[Row], str]
    is_number: bool = False


def emit(text: str) -> None:
    """Print a piece of the answer; a reader that has seen enough ends the command in peace."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still buffered goes nowhere, also at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def note(text: str) -> None:
    """Print something for people that is not part of the answer."""
    print(text, file=sys.stderr, flush=True)


def show_many(rows: Sequence[Row], columns: Sequence[Column], form: Format | None) -> None:
    """Print a list: in JSON an array, with ``jsonl`` an object a line."""
    if form is Format.json:
        emit(json.dumps(list(rows)))
    elif form is Format.jsonl:
        for row in rows:
            emit(json.dumps(row))
    elif form is Format.table or sys.stdout.isatty():
        _print_table(table(rows, columns))
    else:
        print_plain([[column.title for column in columns]])
        print_plain([column.cell(row) for column in columns] for row in rows)


def show_one(row: Row, form: Format | None) -> None:
    """Print one object: for people a line a field."""
    if form in (Format.json, Format.jsonl):
        emit(json.dumps(row))
        return
    pairs = [{"field": name, "value": value} for name, value in _flat(row)]
    columns = [
        Column("FIELD", lambda pair: str(pair["field"])),
        Column("VALUE", lambda pair: plain(pair["value"])),
    ]
    show_many(pairs, columns, form)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> "Table":
    """Return a table that no hostile text in a cell can style or break."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(_printable(column.cell(row))) for column in columns))
    return made


def print_plain(rows: Iterable[Sequence[str]]) -> None:
    """Print tab-separated lines."""
    for row in rows:
        emit("\t".join(_printable(cell) for cell in row))


def plain(value: Any) -> str:
    """Return a value for people: ``-`` for what is unknown."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def age(seconds: float | None) -> str:
    """Return a duration for people, to about two digits; ``never`` for ``None``."""
    if seconds is None:
        return "never"
    for limit, unit, name in ((120, 1, "s"), (7_200, 60, "m"), (172_800, 3_600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f}{name}"
    return f"{seconds / 86_400:.0f}d"


def gigabytes(value: float | None) -> str:
    """Return a size for people; ``?`` if unknown."""
    return "?" if value is None else f"{value:.1f} GiB"


def width_of(made: "Table") -> int:
    """Return how many columns of a terminal a table needs to be shown whole."""
    from rich.console import Console

    wide = Console(width=100_000)
    return max(wide.measure(made).maximum, 1)


def _print_table(made: "Table") -> None:
    from rich.console import Console

    console = Console()
    needed = width_of(made)
    if not sys.stdout.isatty() or console.width < needed:
        # Wider than the terminal: let it wrap there rather than cut an agent's id.
        console = Console(width=needed)
    with console.capture() as capture:
        console.print(made, crop=False, overflow="ignore")
    emit(capture.get().rstrip("\n"))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _flat(row: Row, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for position, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}[{position}].")
        else:
            yield f"{prefix}{name}", value
