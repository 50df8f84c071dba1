"""The pages that say whether a process can do its work."""

import asyncio

import pytest

from chiffon.errors import RegistryUnavailable
from chiffon.observability import health


async def good() -> None:
    pass


async def bad() -> None:
    raise RegistryUnavailable("cannot reach postgresql://me:hunter2@db/x")


async def hangs() -> None:
    await asyncio.Event().wait()


async def buggy() -> None:
    raise ZeroDivisionError("secret")


async def test_all_well_is_200() -> None:
    page = await health.readyz({"broker": good}, True)

    assert (page.status, page.body) == (200, b"[+]broker ok\nreadyz check passed\n")
    assert (await health.readyz({"broker": good}, False)).body == b"ok\n"


async def test_each_failed_check_has_its_reason_and_no_password() -> None:
    page = await health.readyz({"broker": good, "database": bad}, True)

    assert page.status == 503
    assert page.body.decode().splitlines() == [
        "[+]broker ok",
        "[-]database failed: cannot reach postgresql://me:***@db/x",
        "readyz check failed",
    ]
    assert (await health.readyz({"database": bad}, False)).body == b"not ready: database\n"


async def test_a_check_that_takes_too_long_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_SECONDS", 0.05)

    found = await health.examine({"database": hangs, "broker": good})

    assert found.troubles == {"database": "no answer within 0.05 s", "broker": None}


async def test_a_bug_in_a_check_is_a_failed_check() -> None:
    found = await health.examine({"database": buggy})

    assert found.troubles == {"database": "unforeseen: ZeroDivisionError"}
