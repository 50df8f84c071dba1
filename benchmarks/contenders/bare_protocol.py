"""The limit: a bare drain that reads no more than it must, feeding chiffon's bulk statement.

It trusts everything: no properties, no routing keys, no refusals, no heartbeats, no reconnects.
Two batches are committed at a time while the next is read, as chiffon does; uvloop runs it.
"""

import asyncio
import os
import struct
from datetime import datetime
from urllib.parse import unquote, urlsplit
from uuid import UUID

import asyncpg
import msgspec
import uvloop
from asyncpg.prepared_stmt import PreparedStatement
from pamqp import commands, frame

from chiffon.embedded.postgres import asyncpg_url
from chiffon.registry.statements import STATEMENTS

BATCH = 2_000
AT_ONCE = 2
WAIT_SECONDS = 0.02
HEAD = struct.Struct(">BHI")
TAG = struct.Struct(">Q")


class Update(msgspec.Struct):
    """A heartbeat; what the statement takes as text stays text."""

    agent_id: UUID
    agent_type: str
    pool_name: str
    capabilities: msgspec.Raw
    status: str
    hostname: str
    agent_version: str
    incarnation: int
    sequence: int
    sent_at: datetime
    interval_seconds: float
    resources: msgspec.Raw


class Drain(asyncio.Protocol):
    """Collects bodies, and the tag of the last."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.tag = 0
        self.came = asyncio.Event()
        self._rest = b""
        self._replies: asyncio.Queue[object] = asyncio.Queue()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Take whole frames out of what came."""
        data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 8:
            kind, _, size = HEAD.unpack_from(data, at)
            after = at + size + 8
            if after > end:
                break
            if kind == 3:
                self.bodies.append(data[at + 7 : after - 1])
            elif kind == 1:
                if data[at + 7 : at + 11] == b"\0\x3c\0\x3c":
                    self.tag = TAG.unpack_from(data, at + 12 + data[at + 11])[0]
                else:
                    self._replies.put_nowait(frame.unmarshal(data[at:after])[2])
            at = after
        self._rest = data[at:]
        self.came.set()

    async def ask(self, method: object, channel: int = 1) -> object:
        """Send a method and return what comes back."""
        self.transport.write(frame.marshal(method, channel))
        return await self._replies.get()

    async def open(self, url: str) -> None:
        """Log in and consume."""
        parts = urlsplit(url)
        self.transport.write(b"AMQP\0\0\x09\x01")
        await self._replies.get()
        login = f"\0{unquote(parts.username or '')}\0{unquote(parts.password or '')}"
        await self.ask(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
        tune = commands.Connection.TuneOk(16, 131_072, 0)
        self.transport.write(frame.marshal(tune, 0))
        await self.ask(commands.Connection.Open(unquote(parts.path[1:]) or "/"), 0)
        await self.ask(commands.Channel.Open())
        await self.ask(commands.Basic.Qos(prefetch_count=(AT_ONCE + 1) * BATCH))
        await self.ask(commands.Basic.Consume(queue="chiffon.ingest"))


async def main() -> None:
    """Record heartbeats for ever."""
    free: asyncio.Queue[PreparedStatement[asyncpg.Record]] = asyncio.Queue()
    for _ in range(AT_ONCE):
        database = await asyncpg.connect(asyncpg_url(os.environ["CHIFFON_DATABASE_URL"]))
        free.put_nowait(await database.prepare(STATEMENTS["record"].text))
    parts = urlsplit(os.environ["CHIFFON_AMQP_URL"])
    _, drain = await asyncio.get_running_loop().create_connection(
        Drain, parts.hostname or "", parts.port or 5672
    )
    await drain.open(os.environ["CHIFFON_AMQP_URL"])

    async def record(
        statement: "PreparedStatement[asyncpg.Record]",
        bodies: list[bytes],
        tag: int,
        before: asyncio.Task[None] | None,
    ) -> None:
        await statement.fetch(*read(bodies))
        free.put_nowait(statement)
        if before is not None:
            await before
        drain.transport.write(frame.marshal(commands.Basic.Ack(tag, True), 1))

    running: asyncio.Task[None] | None = None
    while True:
        await drain.came.wait()
        if len(drain.bodies) < BATCH:
            await asyncio.sleep(WAIT_SECONDS)
        statement = await free.get()
        drain.came.clear()
        bodies, drain.bodies = drain.bodies, []
        if bodies:
            running = asyncio.create_task(record(statement, bodies, drain.tag, running))
        else:
            free.put_nowait(statement)


decode = msgspec.json.Decoder(Update).decode


def read(bodies: list[bytes]) -> list[list[object]]:
    """Return the columns of a batch, the newest of each agent."""
    newest = {update.agent_id: update for update in map(decode, bodies)}
    updates = [newest[agent_id] for agent_id in sorted(newest)]
    return [
        [one.agent_id for one in updates],
        [one.agent_type for one in updates],
        [one.pool_name for one in updates],
        [bytes(one.capabilities).decode() for one in updates],
        [one.status for one in updates],
        [one.hostname for one in updates],
        [one.agent_version for one in updates],
        [one.incarnation for one in updates],
        [one.sequence for one in updates],
        [one.sent_at for one in updates],
        [one.interval_seconds for one in updates],
        [3 * one.interval_seconds for one in updates],
        [0.0] * len(updates),
        [bytes(one.resources).decode() for one in updates],
    ]


if __name__ == "__main__":
    uvloop.run(main())
