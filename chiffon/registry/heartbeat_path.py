"""Whether heartbeats reach the registry; the statements are in ``sql/heartbeat_path.sql``."""

import time
from collections.abc import Sequence

from chiffon.contract.topology import INGEST
from chiffon.registry.pool import Pool


class HeartbeatPath:
    """The path of the heartbeats, as canaries prove it. Raises what ``Registry`` does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def mark_fresh(
        self,
        received: float,
        delay_seconds: float | None = None,
        *,
        part: str = INGEST,
        path: Sequence[str] = (INGEST,),
    ) -> None:
        """Note that a canary went the whole way to the database.

        The path is fresh while each of its parts is. After a gap of more than 5 s every agent has
        its own full lease to speak again.

        Args:
            received: When this process received it, seconds of ``time.monotonic``.
            delay_seconds: How long it was on its way to us, if that is known.
            part: What it proves.
            path: All the parts; see ``Topology.path``.
        """
        await self._pool.fetch(
            "mark_part_fresh", seconds_ago=time.monotonic() - received, part=part
        )
        await self._pool.fetch("mark_path_fresh", delay_seconds=delay_seconds, path=path)

    async def settle_grace(self) -> None:
        """End the grace as soon as everybody has spoken since the path came back."""
        await self._pool.fetch("settle_grace")

    async def prove_writable(self) -> None:
        """Make sure that the database takes writes, and from us.

        Raises:
            RegistryUnavailable: It takes none now.
            RegistryRefused: We may not write.
        """
        await self._pool.fetch("prove_writable")
