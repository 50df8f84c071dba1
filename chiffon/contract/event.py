"""Events: what is published when something changed."""

from typing import Literal

from chiffon.contract.fields import AgentStatus, Message, Time, Uuid, Whole
from chiffon.contract.reservation import ReservationState


class AgentEvent(Message):
    """An agent's status changed, and that is committed. ``at`` is the orchestrator's clock.

    ``reason`` is why it is offline, ``null`` for the other states.
    """

    agent_id: Uuid
    pool_name: str
    hostname: str | None
    status: AgentStatus
    reason: str | None
    at: Time

    @property
    def routing_key(self) -> str:
        """The key it is published with."""
        return f"agent.{self.agent_id}.{self.status}"


class FleetEvent(Message):
    """Most of a pool became silent at once (``degraded``), or speaks again (``recovered``)."""

    state: Literal["degraded", "recovered"]
    pool_name: str
    at: Time

    @property
    def routing_key(self) -> str:
        """The key it is published with."""
        return f"fleet.{self.state}"


class ReservationEvent(Message):
    """A reservation was ended by us, and that is committed: its room may be another's now."""

    reservation_id: Uuid
    holder: str
    agent_ids: list[Uuid]
    fence: Whole
    state: ReservationState
    reason: str | None
    at: Time

    @property
    def routing_key(self) -> str:
        """The key it is published with."""
        return f"reservation.{self.reservation_id}.{self.state}"
