"""A heartbeat, and when it came."""

from typing import NamedTuple

from chiffon.messages import StatusUpdate


class Receipt(NamedTuple):
    """A heartbeat, and when this process received it: seconds of ``time.monotonic``."""

    update: StatusUpdate
    received: float
