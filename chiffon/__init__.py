"""chiffon tells you which of your machines can take a job right now, over RabbitMQ.

What a program uses is here, each loaded when it is first used, so that an agent stays light:

* ``BaseAgent``, ``AgentIdentity``, ``open_identity``: an agent inside your own program
* ``PlannerClient``: asks for capacity, reserves it, follows events; ``HeldReservation``
* ``CapacityQuery``, ``CapacityReserve``, ``CapacityWait``, ``Alternative``, ``ReservationRenew``,
  ``ReservationRelease``, ``ReservationList``: the requests
* ``CapacityOffers``, ``Offer``, ``AgentCapacity``, ``Explanation``, ``Reservation``: the answers
* ``StatusUpdate``, ``ResourceMetrics``, ``Gpu``: the heartbeat
* ``AgentEvent``, ``FleetEvent``, ``ReservationEvent``: what is published when something changed
* ``OrchestratorService``, ``ReservationService``, ``Registry``, ``AgentRegistry``: the same answers
  from the database, with the extra ``chiffon[orchestrator]``
* every exception, from ``ChiffonError`` down; ``chiffon.errors`` draws their tree
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chiffon.agent.base_agent import BaseAgent
    from chiffon.agent.identity import Identity as AgentIdentity
    from chiffon.agent.identity import open_identity
    from chiffon.capacity.reservations import ReservationService
    from chiffon.capacity.service import OrchestratorService
    from chiffon.contract.messages import (
        AgentCapacity,
        AgentEvent,
        Alternative,
        CapacityOffers,
        CapacityQuery,
        CapacityReserve,
        CapacityWait,
        Explanation,
        FleetEvent,
        Gpu,
        Offer,
        Reservation,
        ReservationEvent,
        ReservationList,
        ReservationRelease,
        ReservationRenew,
        ResourceMetrics,
        StatusUpdate,
    )
    from chiffon.errors import (
        AgentNotFoundError,
        BadConfiguration,
        BusRefused,
        BusUnavailable,
        CapacityError,
        CapacityRefused,
        CapacityTimeout,
        ChiffonError,
        IdempotencyMismatch,
        InsufficientCapacity,
        NoResponders,
        RegistryUnavailable,
        ReservationNotFound,
        StaleFence,
    )
    from chiffon.planner.client import PlannerClient
    from chiffon.planner.held_reservation import HeldReservation
    from chiffon.registry.registry import Registry
    from chiffon.registry.tables import AgentRegistry

__all__ = [
    "AgentCapacity",
    "AgentEvent",
    "AgentIdentity",
    "AgentNotFoundError",
    "AgentRegistry",
    "Alternative",
    "BadConfiguration",
    "BaseAgent",
    "BusRefused",
    "BusUnavailable",
    "CapacityError",
    "CapacityOffers",
    "CapacityQuery",
    "CapacityRefused",
    "CapacityReserve",
    "CapacityTimeout",
    "CapacityWait",
    "ChiffonError",
    "Explanation",
    "FleetEvent",
    "Gpu",
    "HeldReservation",
    "IdempotencyMismatch",
    "InsufficientCapacity",
    "NoResponders",
    "Offer",
    "OrchestratorService",
    "PlannerClient",
    "Registry",
    "RegistryUnavailable",
    "Reservation",
    "ReservationEvent",
    "ReservationList",
    "ReservationNotFound",
    "ReservationRelease",
    "ReservationRenew",
    "ReservationService",
    "ResourceMetrics",
    "StaleFence",
    "StatusUpdate",
    "__version__",
    "open_identity",
]

_ELSEWHERE = {
    "AgentIdentity": ("chiffon.agent.identity", "Identity"),
    "AgentRegistry": ("chiffon.registry.tables", "AgentRegistry"),
    "BaseAgent": ("chiffon.agent.base_agent", "BaseAgent"),
    "HeldReservation": ("chiffon.planner.held_reservation", "HeldReservation"),
    "OrchestratorService": ("chiffon.capacity.service", "OrchestratorService"),
    "PlannerClient": ("chiffon.planner.client", "PlannerClient"),
    "Registry": ("chiffon.registry.registry", "Registry"),
    "ReservationService": ("chiffon.capacity.reservations", "ReservationService"),
    "open_identity": ("chiffon.agent.identity", "open_identity"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chiffon' has no attribute {name!r}")
    errors = import_module("chiffon.errors")
    if name in _ELSEWHERE:
        module, attribute = _ELSEWHERE[name]
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            missing = errors.NotInstalled.of(error)
            if missing is None:
                raise
            raise ImportError(f"chiffon.{name} needs more: {missing}") from None
    if hasattr(errors, name):
        return getattr(errors, name)
    return getattr(import_module("chiffon.contract.messages"), name)
