"""A TCP proxy that can be slow, cut lines in the middle of a frame, or swallow everything."""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Proxy:
    """Stands between the agents and their broker; its faults are attributes set by tests."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.latency_seconds = 0.0
        self.swallows = False
        self.resets_after_bytes: int | None = None
        self.swallowed_bytes = 0
        self.resets = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection(*self._target)
            pumps = [
                asyncio.create_task(self._pump(reader, back)),
                asyncio.create_task(self._pump(there, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.wait(pumps)
                for one in (writer, back):
                    one.close()
        writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                if self.latency_seconds:
                    await asyncio.sleep(self.latency_seconds)
                if self.swallows:
                    self.swallowed_bytes += len(data)
                    continue
                if self.resets_after_bytes is not None:
                    sink.write(data[: random.randint(0, self.resets_after_bytes)])
                    await sink.drain()
                    _reset(sink)
                    self.resets += 1
                    return
                sink.write(data)
                await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Have the kernel answer with RST instead of an orderly end."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
