"""What a proxy says of the request it passes on: believed from addresses that are trusted only."""

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from chiffon.errors import BadConfiguration

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(said: Sequence[str]) -> list[Network]:
    """Return the networks of ``CHIFFON_HTTP_TRUSTED_PROXIES``.

    Raises:
        BadConfiguration: One is none.
    """
    try:
        return [ipaddress.ip_network(one, strict=False) for one in said]
    except ValueError as error:
        raise BadConfiguration(f"CHIFFON_HTTP_TRUSTED_PROXIES: {error}") from None


class Forwarded:
    """Takes scheme, host, path and address of a request from the headers of a trusted proxy.

    Args:
        app: The application.
        trusted: Whose headers are believed; those of others are passed over.
        root_path: Where the application is, unless a proxy says so.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[Network], root_path: str) -> None:
        self._app = app
        self._trusted = trusted
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] == "http":
            scope["root_path"] = self._root_path
            if self._is_trusted(scope["client"]):
                self._apply(scope, Headers(scope=scope))
            # As ASGI has it, the path begins with that of the application.
            scope["path"] = f"{scope['root_path']}{scope['path']}"
        await self._app(scope, receive, send)

    def _is_trusted(self, client: tuple[str, int] | None) -> bool:
        if client is None or not self._trusted:
            return False
        try:
            address = ipaddress.ip_address(client[0])
        except ValueError:  # a socket of another kind
            return False
        # A socket of both kinds shows 10.0.0.1 as ::ffff:10.0.0.1.
        own = getattr(address, "ipv4_mapped", None) or address
        return any(own in network for network in self._trusted)

    def _apply(self, scope: Scope, said: Headers) -> None:
        if said.get("x-forwarded-proto") in ("http", "https"):
            scope["scheme"] = said["x-forwarded-proto"]
        prefix = said.get("x-forwarded-prefix", "").rstrip("/")
        if prefix.startswith("/") and not prefix.startswith("//"):
            scope["root_path"] = prefix
        host = said.get("x-forwarded-host", "").partition(",")[0].strip()
        if host:
            scope["headers"] = list(scope["headers"])
            MutableHeaders(scope=scope)["host"] = host
        # The last that is not one of our proxies: what stands before it anybody can have written.
        for address in reversed(said.get("x-forwarded-for", "").split(",")):
            try:
                client = (str(ipaddress.ip_address(address.strip())), 0)
            except ValueError:
                return
            scope["client"] = client
            if not self._is_trusted(client):
                return
