"""Heartbeats to the columns that one statement records them from."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from chiffon import liveness
from chiffon.messages import ResourceMetrics
from chiffon.receipt import Receipt


def columns(batch: Sequence[Receipt], now: float) -> tuple[list[Any], ...]:
    """Return the arguments of ``RECORD``: a list for each column.

    Args:
        batch: In the order of their agents' ids.
        now: Seconds of ``time.monotonic``: how long each was held goes with it.
    """
    updates = [receipt.update for receipt in batch]
    to_json = ResourceMetrics.__pydantic_serializer__.to_json
    return (
        [one.agent_id for one in updates],
        [one.agent_type for one in updates],
        [one.pool_name for one in updates],
        [_words(tuple(one.capabilities)) for one in updates],
        [one.status for one in updates],
        [one.hostname for one in updates],
        [one.agent_version for one in updates],
        [one.incarnation for one in updates],
        [one.sequence for one in updates],
        [one.sent_at for one in updates],
        [one.interval_seconds for one in updates],
        [liveness.lease(one.interval_seconds) for one in updates],
        [now - receipt.received for receipt in batch],
        [None if one.resources is None else to_json(one.resources).decode() for one in updates],
    )


@lru_cache(maxsize=1_024)
def _words(capabilities: tuple[str, ...]) -> str:
    return json.dumps(capabilities)
