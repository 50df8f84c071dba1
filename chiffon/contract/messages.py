"""The wire contract, version 1: what may be said, and how it is written down.

Bodies are JSON in UTF-8; the AMQP property ``type`` names the message. Unknown fields are ignored
in what is told (heartbeats, answers, events), so that fields can be added, and refused by name in
what is asked: a filter that is ignored offers machines that do not fit. Everything else that does
not fit is refused with one line that names the field. ``_gb`` means GiB (2^30 bytes). ``null``
means unknown and is never written as 0; 0 means a known zero.

Senders that are not chiffon build these bodies by hand from the JSON Schema that
``chiffon schema jsonschema`` prints; nothing here depends on Python on the other side.
"""

from pydantic import BaseModel

from chiffon.contract.capacity import (
    MAX_OFFERS,
    AgentCapacity,
    CapacityOffers,
    CapacityQuery,
    CapacityShow,
    CapacityWait,
    ErrorReply,
    Needs,
    Offer,
    Reported,
)
from chiffon.contract.event import (
    AgentEvent,
    FleetEvent,
    ReservationEvent,
)
from chiffon.contract.explanation import (
    Explanation,
    Miss,
    Obstacle,
    Relaxation,
)
from chiffon.contract.fields import (
    MAX_INTEGER,
    AgentStatus,
    AgentType,
    ErrorCode,
)
from chiffon.contract.heartbeat import (
    SCALAR_METRICS,
    Gpu,
    Kept,
    Observed,
    ObservedGpu,
    ResourceMetrics,
    StatusUpdate,
)
from chiffon.contract.reservation import (
    Alternative,
    CapacityReserve,
    Place,
    Reservation,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
    Reservations,
    ReservationShow,
    ReservationState,
    ReservedGpu,
)

__all__ = [
    "AGENT_EVENT",
    "BODIES",
    "CANARY",
    "CAPACITY_AGENT",
    "CAPACITY_FIND",
    "CAPACITY_OFFERS",
    "CAPACITY_RELEASE",
    "CAPACITY_RENEW",
    "CAPACITY_RESERVATION",
    "CAPACITY_RESERVATIONS",
    "CAPACITY_RESERVE",
    "CAPACITY_SHOW",
    "CAPACITY_WAIT",
    "ERROR",
    "FLEET_EVENT",
    "MAX_INTEGER",
    "MAX_OFFERS",
    "RESERVATION_EVENT",
    "RESERVATION_LIST",
    "RESERVATION_SHOW",
    "SCALAR_METRICS",
    "STATUS_UPDATE",
    "AgentCapacity",
    "AgentEvent",
    "AgentStatus",
    "AgentType",
    "Alternative",
    "CapacityOffers",
    "CapacityQuery",
    "CapacityReserve",
    "CapacityShow",
    "CapacityWait",
    "ErrorCode",
    "ErrorReply",
    "Explanation",
    "FleetEvent",
    "Gpu",
    "Kept",
    "Miss",
    "Needs",
    "Observed",
    "ObservedGpu",
    "Obstacle",
    "Offer",
    "Place",
    "Relaxation",
    "Reported",
    "Reservation",
    "ReservationEvent",
    "ReservationList",
    "ReservationRelease",
    "ReservationRenew",
    "ReservationShow",
    "ReservationState",
    "Reservations",
    "ReservedGpu",
    "ResourceMetrics",
    "StatusUpdate",
]

STATUS_UPDATE = "status_update.v1"
CANARY = "canary.v1"
CAPACITY_SHOW = "capacity.show.v1"
CAPACITY_FIND = "capacity.find.v1"
CAPACITY_WAIT = "capacity.wait.v1"
CAPACITY_RESERVE = "capacity.reserve.v1"
CAPACITY_RENEW = "capacity.renew.v1"
CAPACITY_RELEASE = "capacity.release.v1"
RESERVATION_SHOW = "capacity.reservation.show.v1"
RESERVATION_LIST = "capacity.reservation.list.v1"
CAPACITY_AGENT = "capacity.agent.v1"
CAPACITY_OFFERS = "capacity.offers.v1"
CAPACITY_RESERVATION = "capacity.reservation.v1"
CAPACITY_RESERVATIONS = "capacity.reservations.v1"
ERROR = "error.v1"
AGENT_EVENT = "agent_event.v1"
FLEET_EVENT = "fleet_event.v1"
RESERVATION_EVENT = "reservation_event.v1"

BODIES: dict[str, type[BaseModel]] = {
    STATUS_UPDATE: StatusUpdate,
    CAPACITY_SHOW: CapacityShow,
    CAPACITY_FIND: CapacityQuery,
    CAPACITY_WAIT: CapacityWait,
    CAPACITY_RESERVE: CapacityReserve,
    CAPACITY_RENEW: ReservationRenew,
    CAPACITY_RELEASE: ReservationRelease,
    RESERVATION_SHOW: ReservationShow,
    RESERVATION_LIST: ReservationList,
    CAPACITY_AGENT: AgentCapacity,
    CAPACITY_OFFERS: CapacityOffers,
    CAPACITY_RESERVATION: Reservation,
    CAPACITY_RESERVATIONS: Reservations,
    ERROR: ErrorReply,
    AGENT_EVENT: AgentEvent,
    FLEET_EVENT: FleetEvent,
    RESERVATION_EVENT: ReservationEvent,
}
"""Every message of the contract by its AMQP ``type``."""
