"""AMQP properties that cannot be decoded, kept from ending a connection.

Whoever may publish may set properties that a broker passes on and pamqp raises at: bytes that are
no UTF-8, a time beyond the calendar, tables nested a thousand deep. The library decodes in its
reader task, so that no code of ours sees it, the reader dies, and the connection says that it is
open. One such message so stops a consumer for good.

pamqp looks its decoders up by type. ``install`` puts ones in their place, in this process, that
note what is wrong and go on behind the value, whose length they know. ``undecodable`` tells of a
message which of its values were lost.
"""

import threading
from collections.abc import Callable
from typing import Any

from pamqp import common, decode
from pamqp.commands import Basic
from pamqp.header import ContentHeader

_noted = threading.local()


def install() -> None:
    """Make this process's pamqp forgiving; once is enough, and more often does no harm."""
    if decode.METHODS["shortstr"] is _text:
        return
    decode.METHODS.update(shortstr=_text, timestamp=_time, table=_table)
    original = ContentHeader.unmarshal

    def unmarshal(self: ContentHeader, data: bytes) -> None:
        _noted.problems = []
        original(self, data)
        self.undecodable = _noted.problems  # type: ignore[attr-defined]

    ContentHeader.unmarshal = unmarshal  # type: ignore[method-assign]


def give_up(header: ContentHeader, error: Exception) -> None:
    """Note that nothing of a message's properties could be decoded."""
    header.properties = Basic.Properties()
    header.undecodable = [type(error).__name__]  # type: ignore[attr-defined]


def undecodable(header: ContentHeader) -> str | None:
    """Return which properties of a message could not be decoded, for people; ``None`` if all."""
    problems: list[str] = getattr(header, "undecodable", [])
    return f"its properties cannot be decoded: {', '.join(problems)}" if problems else None


def _text(value: bytes) -> tuple[int, str]:
    try:
        return decode.short_str(value)
    except UnicodeDecodeError:
        end = value[0] + 1
        _note("a text that is not UTF-8")
        return end, value[1:end].decode(errors="replace")


def _time(value: bytes) -> tuple[int, Any]:
    return _else(decode.timestamp, value, 8, None, "a time that no calendar has")


def _table(value: bytes) -> tuple[int, Any]:
    length = common.Struct.integer.unpack_from(value)[0] + 4
    return _else(decode.field_table, value, length, {}, "headers that are no table we can read")


def _else(
    decoder: Callable[[bytes], tuple[int, Any]],
    value: bytes,
    length: int,
    instead: Any,
    problem: str,
) -> tuple[int, Any]:
    try:
        return decoder(value)
    except (ValueError, OverflowError, OSError, ArithmeticError, RecursionError, KeyError):
        _note(problem)
        return length, instead


def _note(problem: str) -> None:
    problems = getattr(_noted, "problems", None)
    if problems is not None:
        problems.append(problem)
