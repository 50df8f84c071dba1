"""The URL of the broker: one host, or several to try in turn."""

import re
from urllib.parse import urlsplit

from chiffon.errors import BadConfiguration


def hosts(url: str) -> list[str]:
    """Return one URL for each host that ``url`` names.

    Args:
        url: ``amqp://user:password@host:5672,other:5672/vhost``, or whole URLs separated by
            commas. ``amqps`` for TLS; its files go into the query (``cafile``, ``certfile``,
            ``keyfile``).

    Raises:
        BadConfiguration: It is not such a URL.
    """
    urls: list[str] = []
    for part in re.split(r",(?=amqps?://)", url.strip()):
        match = re.fullmatch(r"(amqps?://)((?:[^/]*@)?)([^/?@]+)([/?].*)?", part)
        if not match:
            raise BadConfiguration(
                "CHIFFON_AMQP_URL: not an AMQP URL; it looks like amqp://user:password@host/vhost"
            )
        scheme, credentials, names, rest = match.groups()
        urls += [f"{scheme}{credentials}{name}{rest or '/'}" for name in names.split(",")]
    for one in urls:
        try:
            has_host = bool(urlsplit(one).hostname) and urlsplit(one).port != 0
        except ValueError:
            has_host = False
        if not has_host:
            raise BadConfiguration(
                "CHIFFON_AMQP_URL: no host, or a bad port; in a user name or password, "
                "/ is written %2F, @ %40 and : %3A"
            )
    return urls


def host_and_port(url: str) -> str:
    """Return the host and port of a URL with one host."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
