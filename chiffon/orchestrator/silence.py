"""The judgement of the sweep: who is marked offline, and when silence is one outage.

When most of a pool becomes silent at once, that is one incident and not a thousand transitions: its
agents stay online, hidden from offers, until they speak again or until nobody can believe
any more that they will. Pure functions; ``registry.sweep`` counts and writes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

from chiffon.contract.lease import (
    OUTAGE_FEWEST,
    OUTAGE_HOLD_SECONDS,
    OUTAGE_OVER_SHARE,
    OUTAGE_SHARE,
)
from chiffon.registry.sweep import Outage, SilentPool

MARK_ONE_SECONDS = 1.0
"""Between two agents of a pool whose outage has lasted for too long: desktops do go home at
night."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Agents to mark offline, pools whose outage begins, and pools whose outage is over."""

    mark: Sequence[UUID]
    begin: Sequence[str]
    end: Sequence[str]


def judge(
    silent: Iterable[SilentPool],
    outages: Iterable[Outage],
    *,
    share: float = OUTAGE_SHARE,
    hold_seconds: float = OUTAGE_HOLD_SECONDS,
) -> Verdict:
    """Say what follows from who is silent.

    Args:
        silent: The pools that have silent agents; none while the path is not fresh.
        outages: The pools in an outage.
        share: Of a pool, 0 to 1: more than that silent within a lease is an outage.
        hold_seconds: How long nobody of such a pool is marked; after that one a second.
    """
    ongoing = {one.pool_name: one for one in outages}
    over = [name for name, one in ongoing.items() if is_over(one)]
    begins: list[str] = []
    mark: list[UUID] = []
    for pool in silent:
        outage = ongoing.get(pool.pool_name)
        if outage is not None:
            if pool.pool_name not in over and may_mark_one(outage, hold_seconds):
                mark += pool.due[:1]
        elif is_outage(pool, share):
            begins.append(pool.pool_name)
        else:
            mark += pool.due
    return Verdict(mark, begins, over)


def is_outage(pool: SilentPool, share: float = OUTAGE_SHARE) -> bool:
    """Return whether so many of a pool are silent that it is one outage.

    After an absence of broker, database or ourselves, it is enough that more than a quarter of the
    pool has not been heard since: a broker that a whole fleet dials may take longer than a lease
    to let all in.
    """
    if not pool.due or pool.silent + pool.marked <= OUTAGE_FEWEST:
        return False
    is_most = pool.silent + pool.marked > share * (pool.members + pool.marked)
    is_not_back = pool.unheard > max(OUTAGE_FEWEST, OUTAGE_OVER_SHARE * pool.members)
    return is_most or is_not_back


def is_over(outage: Outage) -> bool:
    """Return whether enough of a pool speak again: less than a quarter of it is silent."""
    return not outage.members or outage.silent < OUTAGE_OVER_SHARE * outage.members


def may_mark_one(outage: Outage, hold_seconds: float = OUTAGE_HOLD_SECONDS) -> bool:
    """Return whether an outage has lasted so long that its agents are marked one by one."""
    since = outage.last_marked_seconds_ago
    return outage.seconds > hold_seconds and (since is None or since > MARK_ONE_SECONDS)
