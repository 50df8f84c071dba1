"""Names on the broker, and where answers may go."""

import pytest

from chiffon.contract.topology import Topology, definitions, reply_route


@pytest.mark.parametrize(
    ("reply_to", "route"),
    [
        ("amq.gen-JzTY20BRgKO", ("", "amq.gen-JzTY20BRgKO")),
        ("amq.rabbitmq.reply-to.g2dk", ("", "amq.rabbitmq.reply-to.g2dk")),
        ("/exchanges/chiffon.replies/planner-7.x_Y", ("chiffon.replies", "planner-7.x_Y")),
    ],
)
def test_three_forms_of_reply_to_are_written_to(reply_to: str, route: tuple[str, str]) -> None:
    assert reply_route(reply_to) == route


@pytest.mark.parametrize(
    "reply_to",
    [
        None,
        "",
        "chiffon.ingest",
        "#",
        "amq.rabbitmq.reply-to",
        "/exchanges/chiffon.heartbeats/heartbeat.x",
        "/exchanges/chiffon.replies/",
        "/exchanges/chiffon.replies/a b",
        "/exchanges/chiffon.replies/a\n",
        "/exchanges/chiffon.replies/" + "a" * 201,
        "chiffon.replies",
    ],
)
def test_every_other_reply_to_is_refused(reply_to: str | None) -> None:
    with pytest.raises(ValueError, match="reply_to"):
        reply_route(reply_to)


def test_the_forms_can_be_narrowed() -> None:
    with pytest.raises(ValueError, match="reply_to"):
        reply_route("amq.gen-x", ("replies-exchange",))


@pytest.mark.parametrize("shards", [1, 3])
def test_definitions_hold_every_object_and_not_the_responders_queue(shards: int) -> None:
    made, wanted = definitions("v", shards), Topology.of(shards)

    assert [one["name"] for one in made["exchanges"]] == [one.name for one in wanted.exchanges]
    assert [one["name"] for one in made["queues"]] == [one.name for one in wanted.queues]
    assert len(made["bindings"]) == len(wanted.bindings)
    assert {one["destination"] for one in made["bindings"]} == (
        {one.name for one in wanted.queues} | ({"chiffon.shards.3"} if shards > 1 else set())
    )
    assert "chiffon.capacity" not in str(made)
