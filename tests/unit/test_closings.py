"""What the closing of a connection tells of the agent that had it."""

from uuid import uuid4

from chiffon.closings import Closings

AGENT = uuid4()


async def test_an_agent_that_had_one_connection_closed_it() -> None:
    closings = Closings("amqp://localhost", "a test")
    closings.opened(AGENT, "first")
    closings.closed(AGENT, "first")

    (one,) = closings.current()
    assert (one.agent_id, one.is_known, one.is_line) == (AGENT, True, False)


async def test_of_a_connection_that_was_open_before_we_looked_less_is_known() -> None:
    closings = Closings("amqp://localhost", "a test")
    closings.closed(AGENT, "first")

    assert not closings.current()[0].is_known


async def test_an_agent_that_has_another_connection_lost_nothing() -> None:
    closings = Closings("amqp://localhost", "a test")
    closings.opened(AGENT, "first")
    closings.opened(AGENT, "second")
    closings.closed(AGENT, "first")

    assert closings.current() == []


async def test_an_agent_that_dials_again_tells_of_its_line_then_and_the_next_time() -> None:
    closings = Closings("amqp://localhost", "a test")
    closings.opened(AGENT, "first")
    closings.closed(AGENT, "first")
    closings.opened(AGENT, "second")
    assert closings.current()[0].is_line

    closings.closed(AGENT, "second")
    assert closings.current()[0].is_line


async def test_closings_just_after_our_own_line_broke_tell_of_the_line_alone() -> None:
    closings = Closings("amqp://localhost", "a test")
    closings.following()
    closings.closed(AGENT, "<1>")
    assert not closings.current()[0].is_line, "at the start nothing broke"

    closings.lost()
    assert closings.current() == []
    closings.following()
    closings.closed(AGENT, "<2>")
    assert closings.current()[0].is_line
