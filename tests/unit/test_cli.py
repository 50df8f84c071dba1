"""The command line: its shape, and its forms of output."""

import inspect
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from chiffon.cli import app
from chiffon.cli.output import Column, Format, age, show_many, show_one, table

COLUMNS = [
    Column("NAME", lambda row: str(row["name"])),
    Column("SIZE", lambda row: str(row["size"])),
]
ROWS: list[dict[str, Any]] = [
    {"name": "a\tb\x1b[31m\n", "size": 1},
    {"name": "x" * 200, "size": None},
]


def commands(group: typer.Typer) -> Iterator[Any]:
    for command in group.registered_commands:
        yield command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance)


def test_no_command_is_a_coroutine_that_nobody_would_await() -> None:
    found = list(commands(app))

    assert len(found) >= 14
    assert [command for command in found if inspect.iscoroutinefunction(command)] == []


def test_every_command_says_what_it_does() -> None:
    assert [command for command in commands(app) if not inspect.getdoc(command)] == []


def test_off_a_terminal_a_list_is_tab_separated_and_never_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_many(ROWS, COLUMNS, None)

    assert capsys.readouterr().out.splitlines() == [
        "NAME\tSIZE",
        "a b [31m \t1",
        "x" * 200 + "\tNone",
    ]


def test_every_form_has_the_same_data(capsys: pytest.CaptureFixture[str]) -> None:
    show_many(ROWS, COLUMNS, Format.json)
    as_json = json.loads(capsys.readouterr().out)
    show_many(ROWS, COLUMNS, Format.jsonl)
    as_lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert as_json == as_lines == ROWS


def test_a_table_that_was_asked_for_is_not_cut_either(capsys: pytest.CaptureFixture[str]) -> None:
    show_many(ROWS, COLUMNS, Format.table)

    assert "x" * 200 in capsys.readouterr().out


def test_hostile_text_cannot_style_a_table() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=300, force_terminal=True, no_color=True)
    console.print(table([{"name": "[bold]\x1b[31mred\x07", "size": 1}], COLUMNS))

    assert isinstance(console.file, io.StringIO)
    assert "[bold] [31mred " in console.file.getvalue()


def test_one_object_is_shown_a_line_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    show_one({"a": None, "b": {"c": [1, 2]}, "d": [{"e": True}]}, None)

    assert capsys.readouterr().out.splitlines() == [
        "FIELD\tVALUE",
        "a\t-",
        "b.c\t1, 2",
        "d[0].e\tyes",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "never"), (0.4, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172800, "2d")],
)
def test_ages_are_short(seconds: float | None, said: str) -> None:
    assert age(seconds) == said
