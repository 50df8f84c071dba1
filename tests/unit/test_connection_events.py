"""What the closing of a connection tells of the agent that had it."""

from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from chiffon.orchestrator import connection_events
from chiffon.orchestrator.connection_events import ConnectionEvents

AGENT = uuid4()


class Sweep:
    """Notes who is to be hidden."""

    def __init__(self) -> None:
        self.hidden: list[UUID] = []

    async def hide_disconnected(self, agents: list[UUID], _: list[float]) -> list[Any]:
        self.hidden += agents
        return []


@pytest.fixture
def sweep() -> Sweep:
    return Sweep()


@pytest.fixture
def events(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> ConnectionEvents:
    monkeypatch.setattr(connection_events, "SETTLE_SECONDS", 0.0)
    registry = type("Registry", (), {"sweep": sweep})()
    return ConnectionEvents("amqp://localhost", "a test", cast(Any, registry))


async def test_an_agent_whose_only_connection_closed_is_hidden_once(
    events: ConnectionEvents, sweep: Sweep
) -> None:
    events.opened(AGENT, "first")
    events.closed(AGENT, "first")
    await events.due.wait()

    await events.hide()
    await events.hide()

    assert sweep.hidden == [AGENT]


async def test_a_connection_that_was_open_before_we_followed_counts_too(
    events: ConnectionEvents, sweep: Sweep
) -> None:
    events.closed(AGENT, "first")

    await events.hide()

    assert sweep.hidden == [AGENT]


async def test_an_agent_that_has_another_connection_lost_nothing(
    events: ConnectionEvents, sweep: Sweep
) -> None:
    events.opened(AGENT, "first")
    events.opened(AGENT, "second")
    events.closed(AGENT, "first")

    await events.hide()

    assert sweep.hidden == []


async def test_an_agent_that_dialled_again_meanwhile_is_not_hidden(
    events: ConnectionEvents, sweep: Sweep
) -> None:
    events.opened(AGENT, "first")
    events.closed(AGENT, "first")
    events.opened(AGENT, "second")

    await events.hide()

    assert sweep.hidden == []


async def test_after_our_own_connection_broke_nothing_is_known(
    events: ConnectionEvents, sweep: Sweep
) -> None:
    events.closed(AGENT, "first")
    events.lost()

    await events.hide()

    assert sweep.hidden == []


async def test_an_agent_is_not_hidden_before_it_had_time_to_dial_again(sweep: Sweep) -> None:
    registry = type("Registry", (), {"sweep": sweep})()
    events = ConnectionEvents("amqp://localhost", "a test", cast(Any, registry))
    events.closed(AGENT, "first")

    await events.hide()

    assert sweep.hidden == []
