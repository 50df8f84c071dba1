"""Lease arithmetic: pure functions of numbers. No clock, no I/O.

All durations are seconds. An agent promises its next heartbeat (``interval``), is silent after
three missed ones, and is marked offline only after it also had time to dial again. The registry's
statements take every constant from here.
"""

MISSED_HEARTBEATS = 3
SHORTEST_LEASE_SECONDS = 5.0
LONGEST_INTERVAL_SECONDS = 600.0

FUTURE_SECONDS = 5.0
"""A heartbeat from further in the future than this is none: the database's clock was set back."""

TIME_TO_RENEW_SECONDS = 10.0
"""For the holders of reservations, or their lease if that is less, after an absence of the path."""

CANARY_INTERVAL_SECONDS = 2.0
CANARY_FRESH_SECONDS = 5.0
"""A path whose last canary is older than this has not been proven to work."""

OUTAGE_SHARE = 0.55
OUTAGE_FEWEST = 2
"""More than this share of a pool, and more than so many, silent at once are one outage."""

OUTAGE_OVER_SHARE = 0.25
"""The outage is over when less than this share is still silent. After an absence of broker,
database or ourselves, a pool of which more has not been heard since is in one."""

OUTAGE_HOLD_SECONDS = 600.0
"""For so long nobody of such a pool is marked; after that one agent a second."""

FIRST_REDIAL_SECONDS = 0.5


def lease_for(interval_seconds: float) -> float:
    """Return for how long an agent counts as alive after one heartbeat.

    Args:
        interval_seconds: The interval that the agent promised, 0.5 to 600.

    Returns:
        Three intervals, and never less than 5 s: below that, a garbage collection looks like
        a death.
    """
    return max(MISSED_HEARTBEATS * interval_seconds, SHORTEST_LEASE_SECONDS)


def redial_cap(lease_seconds: float) -> float:
    """Return the longest pause between two dials: a third of the lease."""
    return lease_seconds / 3


def offline_after(lease_seconds: float) -> float:
    """Return the silence after which an agent is marked offline.

    The lease, and the longest pause that an agent whose connection broke may make before it dials
    again. Offers do not wait for this: an agent past its lease is not offered.
    """
    return lease_seconds + redial_cap(lease_seconds)


def redial_delay(attempt: int, cap_seconds: float, uniform: float) -> float:
    """Return how long to wait before dial number ``attempt``.

    Full jitter: the delay is anywhere between nothing and a bound that doubles. A fleet whose
    broker restarted so comes back spread out and not in step.

    Args:
        attempt: 0 for the first dial after a connection broke.
        cap_seconds: The largest bound.
        uniform: A random number in [0, 1).

    Returns:
        Less than 0.5 s for the first attempt, less than ``cap_seconds`` for any.
    """
    bound = FIRST_REDIAL_SECONDS * 2.0 ** min(attempt, 30)
    return uniform * min(bound, cap_seconds)
