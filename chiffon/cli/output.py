"""How answers are printed: a table for people, JSON or tab-separated text for programs.

The same data in every form. Tables are for a terminal; elsewhere a table is tab-separated text
that is never cut.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiffon.errors import NotWritten

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


WideOption = Annotated[
    bool, typer.Option("--wide", help="All columns and whole ids, however narrow the terminal.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--columns", help="Only these columns, by their titles: host,status,free-cores."),
]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        title: Its heading.
        cell: Makes the text for a person from a row.
        is_number: Whether to align to the right.
        rank: Where there is no room for all, those of the highest rank are left out first; 0
            stays.
        is_id: Whether a terminal shows as much of it as tells the rows apart.
    """

    title: str
    cell: Callable[[Row], str]
    is_number: bool = False
    rank: int = 0
    is_id: bool = False

    @property
    def name(self) -> str:
        """What ``--columns`` calls it."""
        return self.title.lower().replace(" ", "-").replace("/", "-")


@dataclass(frozen=True)
class Shape:
    """What somebody wants to see of a table: ``columns`` by their names, or all of it.

    ``is_asked``: whether the command has the options for it.
    """

    is_wide: bool = False
    columns: Sequence[str] = ()
    is_asked: bool = False

    @classmethod
    def of(cls, wide: bool, columns: str | None) -> "Shape":
        """Return what the options of the same names say."""
        names = [one.strip().lower() for one in (columns or "").split(",") if one.strip()]
        return cls(wide, names, is_asked=True)

    def chosen(self, columns: Sequence[Column]) -> Sequence[Column]:
        """Return the columns that were asked for, in that order; all if none were.

        Raises:
            typer.BadParameter: There is no such column; the message lists them.
        """
        by_name = {column.name: column for column in columns}
        for name in self.columns:
            if name not in by_name:
                raise typer.BadParameter(
                    f"--columns: no column {name!r}; there are {', '.join(by_name)}"
                )
        return [by_name[name] for name in self.columns] or columns


AS_IT_FITS = Shape()

UNWRITABLE = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EBADF, errno.EDQUOT}
"""What a stream says that nobody can write to."""

SHORTEST_ID = 8
PADDING = 2
LAST_STREAM = 2


def prepare() -> None:
    """Make the streams such that no letter ends a command, and none that is not there."""
    # A file that is opened while one of them is closed would be taken for it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STREAM:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_terminal() -> bool:
    """Return whether a person reads the answer as it comes."""
    return sys.stdout.isatty()


def emit(text: str) -> None:
    """Print a piece of the answer; a reader that has seen enough ends the command in peace.

    Raises:
        NotWritten: The disk is full, or the stream is closed.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        abandon()
        raise typer.Exit(0) from None
    except OSError as error:
        abandon()
        raise NotWritten(f"the answer could not be written: {error.strerror}") from None


def note(text: str) -> None:
    """Print something for people that is not part of the answer."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def abandon() -> None:
    """Let what is still buffered go nowhere, also at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_many(
    rows: Sequence[Row],
    columns: Sequence[Column],
    form: Format | None,
    shape: Shape = AS_IT_FITS,
) -> None:
    """Print a list: in JSON an array, with ``jsonl`` an object a line."""
    columns = shape.chosen(columns)
    if form is Format.json:
        emit(json.dumps(list(rows)))
    elif form is Format.jsonl:
        for row in rows:
            emit(json.dumps(row))
    elif is_terminal():
        _print_table(rows, columns, shape)
    elif form is Format.table:
        _print_table(rows, columns, Shape(is_wide=True))
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
    """Return a table of all columns that no hostile text in a cell can style or break."""
    return _made(columns, [[_printable(one.cell(row)) for one in columns] for row in rows])


def _made(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, PADDING, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))
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


def fitting(
    rows: Sequence[Row], columns: Sequence[Column], width: int, shape: Shape = AS_IT_FITS
) -> "Table":
    """Return a table for a terminal of so many columns, without those that find no room in it.

    Args:
        rows: What is in it.
        columns: All that there are.
        width: Of the terminal, in letters.
        shape: What was asked for: what was named, and a wide table, stay whole.
    """
    from rich.cells import cell_len

    if shape.is_wide:
        return table(rows, columns)
    texts = {column.title: _texts(rows, column) for column in columns}
    widths = {
        title: max(map(cell_len, (title, *shown))) + PADDING for title, shown in texts.items()
    }
    kept = list(columns)
    while sum(widths[one.title] for one in kept) - PADDING > width and not shape.columns:
        last = max(kept, key=lambda one: one.rank)
        if not last.rank:
            break
        kept.remove(last)
    return _made(kept, [[texts[one.title][at] for one in kept] for at in range(len(rows))])


def _texts(rows: Sequence[Row], column: Column) -> list[str]:
    whole = [_printable(column.cell(row)) for row in rows]
    if not column.is_id:
        return whole
    ids, length = set(whole), SHORTEST_ID
    while len({one[:length] for one in ids}) < len(ids):
        length += 1
    return [one[:length] for one in whole]


def _print_table(rows: Sequence[Row], columns: Sequence[Column], shape: Shape) -> None:
    from rich.console import Console

    console = Console()
    made = fitting(rows, columns, console.width, shape)
    needed = max(Console(width=100_000).measure(made).maximum, 1)
    if not is_terminal() or console.width < needed:
        # Wider than the terminal: let it wrap there rather than cut what somebody asked for.
        console = Console(width=needed)
    with console.capture() as capture:
        console.print(made, crop=False, overflow="ignore")
    emit(capture.get().rstrip("\n"))
    left_out = len(columns) - len(made.columns)
    if left_out and shape.is_asked:
        note(f"{left_out} columns more with --wide")


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
