"""The consumer's end of a TCP connection: bytes to frames and back, and a broker that is silent."""

import asyncio
import logging
import time

from chiffon.amqp.frames import HEARTBEAT, BadFrame, Delivery, FrameReader, Method
from chiffon.errors import BusUnavailable

log = logging.getLogger(__name__)


class Transport(asyncio.Protocol):
    """Reads and writes frames; ``Consumer`` says what to do with what comes.

    Args:
        broker: The other end, for people.
    """

    def __init__(self, broker: str) -> None:
        self._frames = FrameReader()
        self._broker = broker
        self._transport: asyncio.Transport | None = None
        self._read_at = self._written_at = time.monotonic()
        self._heartbeat: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """End the connection without a word."""
        self.stop_heartbeats()
        if self._transport is not None:
            self._transport.abort()

    def write(self, data: bytes) -> None:
        """Write frames; on a connection that is closing nothing is done."""
        if self._transport is not None and not self._transport.is_closing():
            self._written_at = time.monotonic()
            self._transport.write(data)

    def exchange_heartbeats(self, seconds: float) -> None:
        """Send AMQP heartbeats, and fail when nothing came from the broker for two of them.

        Args:
            seconds: As agreed; 0 for none.
        """
        if not seconds:
            return
        now = time.monotonic()
        if now - self._read_at > 2 * seconds:
            self.fail(BusUnavailable(f"{self._broker} is silent for {2 * seconds} s"))
            return
        if now - self._written_at >= seconds / 2:
            self.write(HEARTBEAT)
        loop = asyncio.get_running_loop()
        self._heartbeat = loop.call_later(seconds / 4, self.exchange_heartbeats, seconds)

    def stop_heartbeats(self) -> None:
        """Send no more AMQP heartbeats, and wait for none."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    def on_deliveries(self, deliveries: list[Delivery], received: float) -> None:
        """Handle what was delivered; ``received`` is seconds of the monotonic clock."""
        raise NotImplementedError

    def on_method(self, method: Method) -> None:
        """Handle whatever else came."""
        raise NotImplementedError

    def fail(self, error: BusUnavailable) -> None:
        """End a connection that cannot be used further; what comes after it is not read."""
        raise NotImplementedError

    # What follows is for the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def eof_received(self) -> None:  # noqa: D102
        self.fail(BusUnavailable(f"the connection broke: closed by {self._broker}"))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self.fail(BusUnavailable(f"the connection broke: {error or f'closed by {self._broker}'}"))

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._read_at = time.monotonic()
        try:
            deliveries, methods = self._frames.read(data)
            at = 0
            for method in methods:
                if method.after > at:
                    self.on_deliveries(deliveries[at : method.after], self._read_at)
                    at = method.after
                self.on_method(method)
            if at < len(deliveries):
                self.on_deliveries(deliveries[at:] if at else deliveries, self._read_at)
        except BadFrame as error:
            self.fail(error)
        except Exception as error:
            # A bug must end this connection and not only stop it from being read.
            log.exception("handling what %s sent failed", self._broker)
            self.fail(BusUnavailable(f"handling what {self._broker} sent failed: {error!r}"))
