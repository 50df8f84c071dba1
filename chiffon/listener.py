"""Where agents dial a relay, as if it were the broker."""

import asyncio
import hmac
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from chiffon.errors import BadConfiguration
from chiffon.frames import Delivery
from chiffon.guest import CLOSE_SECONDS, HANDSHAKE_SECONDS, Guest, Lane

Take = Callable[[Lane, Delivery], None]

_FORCED = 320

_TLS_LIMITS: dict[str, Any] = {
    "ssl_handshake_timeout": HANDSHAKE_SECONDS,
    "ssl_shutdown_timeout": CLOSE_SECONDS,
}


class Listener:
    """Listens for clients, and hands on what they publish.

    Args:
        take: Is given each message and the channel it came on, in the loop; it must not wait.
        login: ``user:password`` that clients have to give; ``None`` for whatever they give.
    """

    def __init__(self, take: Take, login: str | None = None) -> None:
        self.take = take
        self.guests: set[Guest] = set()
        self.blocked: str | None = None
        self._login = login

    @asynccontextmanager
    async def listening(
        self, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[int]:
        """Listen while the context is open; at its end clients are told that it was meant so.

        Args:
            host: The address to listen on.
            port: 0 for any that is free.
            tls: With a certificate; ``None`` for none.

        Yields:
            The port.

        Raises:
            BadConfiguration: Nobody can listen there.
        """
        loop = asyncio.get_running_loop()
        try:
            limits = {} if tls is None else _TLS_LIMITS
            server = await loop.create_server(
                lambda: Guest(self), host, port, ssl=tls, backlog=1_024, **limits
            )
        except OSError as error:
            raise BadConfiguration(
                f"CHIFFON_RELAY_PORT: cannot listen on {host}:{port}: {error.strerror or error}"
            ) from None
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            leaving = [guest.gone for guest in self.guests]
            for guest in self.guests:
                guest.close(_FORCED, "CONNECTION_FORCED - the relay stops")
            if leaving:
                await asyncio.wait(leaving, timeout=CLOSE_SECONDS + 1)

    def lets_in(self, mechanism: str | None, response: str | bytes | None) -> bool:
        """Return whether this is the login that clients have to give."""
        given = (response or "").encode() if not isinstance(response, bytes) else response
        _, _, credentials = given.partition(b"\0")
        wanted = (self._login or "").replace(":", "\0", 1).encode()
        is_it = hmac.compare_digest(credentials, wanted)
        return mechanism == "PLAIN" and (is_it or self._login is None)

    def block(self, reason: str) -> None:
        """Ask clients to publish nothing, until ``unblock``."""
        if self.blocked is None:
            self.blocked = reason
            for guest in self.guests:
                guest.tell_blocked(reason)

    def unblock(self) -> None:
        """Let clients publish again."""
        if self.blocked is not None:
            self.blocked = None
            for guest in self.guests:
                guest.tell_blocked(None)
