"""URLs of brokers, and what the AMQP library raises."""

import asyncio
from contextlib import suppress

import aiormq
import pytest

from chiffon.amqp.translation import translated
from chiffon.amqp.url import hosts
from chiffon.errors import (
    BadConfiguration,
    BusRefused,
    BusUnavailable,
    TopologyMissing,
    masked,
)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://h", ["amqp://h/"]),
        ("amqp://u:p@h:1/v", ["amqp://u:p@h:1/v"]),
        ("amqp://u:p@a:1,b:2/v?x=y", ["amqp://u:p@a:1/v?x=y", "amqp://u:p@b:2/v?x=y"]),
        ("amqp://a/v,amqps://b/w", ["amqp://a/v", "amqps://b/w"]),
        ("amqp://u:p@[::1]:5672/v", ["amqp://u:p@[::1]:5672/v"]),
    ],
)
def test_a_url_may_name_several_hosts(url: str, expected: list[str]) -> None:
    assert hosts(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "http://u:hunter2@h/",
        "u:hunter2@h/v",
        "amqp://",
        "amqp://u:hunter2@h:x/v",
        "amqp://u:hun/ter2@h/v",
        "amqp://h:70000/",
    ],
)
def test_what_is_not_an_amqp_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(BadConfiguration) as refused:
        hosts(url)

    assert "hun" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqp://bob:hunter2@h:5672/v", "amqp://bob:***@h:5672/v"),
        (
            "to amqp://a:b@h and postgresql://c:d@h/x",
            "to amqp://a:***@h and postgresql://c:***@h/x",
        ),
        ("amqp://bob:hun@ter:2@h/v", "amqp://bob:***@h/v"),
        ("amqp://bob:pa/ss@h/v", "amqp://bob:***@h/v"),
        ("amqp://:hunter2@h", "amqp://:***@h"),
        (
            "postgresql://h/d?user=u&password=hunter2&x=1",
            "postgresql://h/d?user=u&password=***&x=1",
        ),
        ("amqp://h/v", "amqp://h/v"),
        ("at 12:30 mail a@b", "at 12:30 mail a@b"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


async def test_a_bug_is_not_taken_for_a_broken_connection() -> None:
    with pytest.raises(ZeroDivisionError), translated("doing"):
        raise ZeroDivisionError


async def test_a_cancellation_that_nobody_asked_for_is_a_broken_connection() -> None:
    with (
        pytest.raises(BusUnavailable, match="publishing: the connection broke"),
        translated("publishing"),
    ):
        raise asyncio.CancelledError


async def test_a_cancellation_that_somebody_asked_for_stays_one() -> None:
    async def wait() -> None:
        with translated("publishing"):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("raised", "ours"),
    [
        (TimeoutError(), BusUnavailable),
        (OSError("x"), BusUnavailable),
        (RuntimeError("x"), BusUnavailable),
        (Exception(), BusUnavailable),
        (aiormq.exceptions.ChannelNotFoundEntity("no exchange"), TopologyMissing),
        (aiormq.exceptions.ChannelAccessRefused("no"), BusRefused),
        (aiormq.exceptions.ChannelInvalidStateError("closed"), BusUnavailable),
    ],
)
async def test_library_errors_become_ours(raised: Exception, ours: type[Exception]) -> None:
    with pytest.raises(ours), translated("doing"):
        raise raised


async def test_a_cancellation_that_the_library_shrugs_off_is_raised_all_the_same() -> None:
    async def shrug() -> None:
        with translated("doing"), suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    task = asyncio.create_task(shrug())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()


async def test_what_tidies_up_after_a_cancellation_is_not_cancelled_again() -> None:
    tidied = False

    async def tidy_up() -> None:
        nonlocal tidied
        try:
            await asyncio.sleep(60)
        finally:
            with translated("tidying up"):
                await asyncio.sleep(0)
            tidied = True

    task = asyncio.create_task(tidy_up())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert tidied
