"""One end of an AMQP connection: bytes to frames and back, and a peer that fell silent."""

import asyncio
import logging
import time

from chiffon.errors import BusUnavailable
from chiffon.frames import HEARTBEAT, BadFrame, Delivery, Frames, Method

log = logging.getLogger(__name__)


class Peer(asyncio.Protocol):
    """What both ends of a connection do alike; see ``Consumer`` and ``Guest``.

    Args:
        frames: Reads what the other end writes.
        who: The other end, for people.
    """

    def __init__(self, frames: Frames, who: str) -> None:
        self._frames = frames
        self._who = who
        self._transport: asyncio.Transport | None = None
        self._heard = self._spoke = time.monotonic()
        self._beating: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """End the connection without a word."""
        self.stop_beating()
        if self._transport is not None:
            self._transport.abort()

    def write(self, data: bytes) -> None:
        """Write frames; on a connection that is closing nothing is done."""
        if self._transport is not None and not self._transport.is_closing():
            self._spoke = time.monotonic()
            self._transport.write(data)

    def pause(self) -> None:
        """Read nothing more until ``resume``: what is on its way waits in the network."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on, if reading was paused."""
        if self._transport is not None and not self._is_read:
            self._heard = time.monotonic()
            self._transport.resume_reading()

    def beat(self, seconds: float) -> None:
        """Send AMQP heartbeats, and take a peer for dead of which nothing came for two of them.

        Args:
            seconds: As agreed; 0 for none.
        """
        if not seconds:
            return
        now = time.monotonic()
        if now - self._heard > 2 * seconds and self._is_read:
            self.fail(BusUnavailable(f"{self._who} is silent for {2 * seconds} s"))
            return
        if now - self._spoke >= seconds / 2:
            self.write(HEARTBEAT)
        self._beating = asyncio.get_running_loop().call_later(seconds / 4, self.beat, seconds)

    def stop_beating(self) -> None:
        """Send no more AMQP heartbeats, and wait for none."""
        if self._beating is not None:
            self._beating.cancel()

    @property
    def _is_read(self) -> bool:
        return self._transport is not None and (
            self._transport.is_closing() or self._transport.is_reading()
        )

    def on_messages(self, deliveries: list[Delivery], received: float) -> None:
        """Take messages that came at a time, seconds of the monotonic clock."""
        raise NotImplementedError

    def on_method(self, method: Method) -> None:
        """Take whatever else came."""
        raise NotImplementedError

    def fail(self, error: BusUnavailable) -> None:
        """End a connection that cannot be used further; what comes after it is not read."""
        raise NotImplementedError

    # What follows is for the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def eof_received(self) -> None:  # noqa: D102
        self.fail(BusUnavailable(f"the connection broke: closed by {self._who}"))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self.fail(BusUnavailable(f"the connection broke: {error or f'closed by {self._who}'}"))

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._heard = time.monotonic()
        try:
            deliveries, methods = self._frames.read(data)
            at = 0
            for method in methods:
                if method.after > at:
                    self.on_messages(deliveries[at : method.after], self._heard)
                    at = method.after
                self.on_method(method)
            if at < len(deliveries):
                self.on_messages(deliveries[at:] if at else deliveries, self._heard)
        except BadFrame as error:
            self.fail(error)
        except Exception as error:
            # A bug must end this connection and not only stop it from being read.
            log.exception("taking what %s sent failed", self._who)
            self.fail(BusUnavailable(f"taking what {self._who} sent failed: {error!r}"))
