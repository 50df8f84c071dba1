"""Why agents are not offered, and what could be asked for instead."""

from typing import Any

from pydantic import Field

from chiffon.contract.fields import Message, Time, Uuid, Whole


class Obstacle(Message):
    """A rule that keeps agents from being offered; each agent is counted once, with its first."""

    rule: str
    agents: Whole
    needed: float | None = Field(description="For rules about an amount.")
    most: float | None = Field(description="The most that one of them has.")
    hostname: str | None = Field(description="Who has it.")
    message: str


class Miss(Message):
    """An agent that is not offered, and every reason why."""

    agent_id: Uuid
    hostname: str | None
    pool_name: str
    reasons: list[str]


class Relaxation(Message):
    """The smallest change of the question with which an agent would be offered.

    ``changes`` holds the fields to ask with instead. The fewest fields that have to change come
    first, then the smallest share that an amount has to give up.
    """

    changes: dict[str, Any]
    agent_id: Uuid | None = Field(description="Who would be offered; null if several would.")
    hostname: str | None
    message: str


class Explanation(Message):
    """What became of every agent of the fleet in the light of one question.

    ``agents`` = ``fitting`` + the sum over ``obstacles``. ``nearest`` names up to 100 of those
    that are not offered, those with the fewest reasons first. ``relaxation`` is ``null`` where
    enough agents fit, and where no change of the question would help.
    """

    as_of: Time
    agents: Whole
    fitting: Whole
    summary: str
    obstacles: list[Obstacle]
    nearest: list[Miss]
    relaxation: Relaxation | None = None
