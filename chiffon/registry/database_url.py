"""The URL of the database: what libpq's URLs may say, as far as asyncpg can do it.

What asyncpg cannot do is refused by name: a word that is ignored is a certificate not looked at.
The parameters are those of PostgreSQL's manual, "Connection Strings", and one of ours.
"""

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from chiffon.errors import BadConfiguration

Prepared = Literal["auto", "on", "off"]

DEFAULT_PORT = 5432


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """Where the database is, and how to connect to it.

    Args:
        hosts: Host and port of each, in the order in which they are tried; ``None`` for what
            libpq's variables or a service file say.
        driver: Arguments of ``asyncpg.connect`` but for the host.
        application_name: Shown in ``pg_stat_activity``.
        settings: Of the session, as ``options`` gives them.
        connect_seconds: For one host, if the URL says so.
        prepared_statements: Whether the server side keeps statements; ``auto`` finds out.
        is_balanced: Whether the first host is drawn by chance.
    """

    hosts: tuple[tuple[str, int] | None, ...]
    driver: Mapping[str, Any]
    application_name: str
    settings: Mapping[str, str]
    connect_seconds: float | None
    prepared_statements: Prepared
    is_balanced: bool


def parse(url: str) -> DatabaseUrl:
    """Read a URL.

    Raises:
        BadConfiguration: It is no PostgreSQL URL, or says what we cannot do; the message names it.
    """
    scheme, has_scheme, _ = url.partition("://")
    if not has_scheme or scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
        raise _refused("not a PostgreSQL URL; it looks like postgresql://user:password@host/name")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _refused(str(error)) from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    _refuse_others(query)
    login, _, listed = parts.netloc.rpartition("@")
    user, has_password, password = login.partition(":")
    given = {
        "user": query.pop("user", None) or unquote(user) or None,
        "password": query.pop("password", None) or (unquote(password) if has_password else None),
        "database": query.pop("dbname", None) or unquote(parts.path.removeprefix("/")) or None,
    }
    hosts = _hosts(listed, query.pop("host", None), query.pop("port", None))
    attributes = query.pop("target_session_attrs", None)
    if attributes is None and len(hosts) > 1:
        attributes = "read-write"  # all that chiffon does with its database writes
    name = query.pop("application_name", None) or query.pop("fallback_application_name", None)
    settings = _settings(query.pop("options", ""))
    seconds = query.pop("connect_timeout", None)
    prepared = cast(Prepared, query.pop("prepared_statements", "auto"))
    is_balanced = query.pop("load_balance_hosts", "disable") == "random"
    driver = {key: query.pop(key) for key in _OF_THE_DRIVER if key in query}
    tls = {key: value for key, value in query.items() if key in _OF_TLS}
    return DatabaseUrl(
        hosts=hosts,
        driver={
            **{key: value for key, value in given.items() if value is not None},
            **driver,
            **({"target_session_attrs": attributes} if attributes else {}),
            # Of TLS asyncpg takes most from a URL only.
            "dsn": f"postgresql://?{urlencode(tls)}" if tls else None,
        },
        application_name=name or "chiffon",
        settings=settings,
        connect_seconds=float(seconds) if seconds and int(seconds) > 0 else None,
        prepared_statements=prepared,
        is_balanced=is_balanced,
    )


_OF_THE_DRIVER = ("passfile", "service", "krbsrvname", "gsslib")
_OF_TLS = (
    *("sslmode", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl", "sslnegotiation"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version"),
)
_ANY = re.compile(".*", re.DOTALL)
_TLS_VERSION = re.compile(r"TLSv1(\.[123])?")
_TAKEN: Mapping[str, re.Pattern[str]] = {
    **dict.fromkeys(("host", "port", "user", "password", "dbname", "options"), _ANY),
    **dict.fromkeys((*_OF_THE_DRIVER, "application_name", "fallback_application_name"), _ANY),
    **dict.fromkeys(("sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl"), _ANY),
    "sslmode": re.compile("disable|allow|prefer|require|verify-ca|verify-full"),
    "sslnegotiation": re.compile("postgres|direct"),
    "ssl_min_protocol_version": _TLS_VERSION,
    "ssl_max_protocol_version": _TLS_VERSION,
    "connect_timeout": re.compile(r"\d{1,6}"),
    # Whoever only reads cannot record heartbeats.
    "target_session_attrs": re.compile("any|primary|read-write"),
    "load_balance_hosts": re.compile("disable|random"),
    "prepared_statements": re.compile("auto|on|off"),
    # What follows asyncpg does in one way only, which is the one that is taken.
    "client_encoding": re.compile("auto|utf-?8", re.IGNORECASE),
    "gssencmode": re.compile("disable|prefer"),
    "channel_binding": re.compile("disable|prefer"),
    "sslcompression": re.compile("0"),
    "sslsni": re.compile("1"),
}
"""The parameters that are taken, and the values."""


def _refuse_others(query: Mapping[str, str]) -> None:
    for name, value in query.items():
        if name not in _TAKEN:
            near = difflib.get_close_matches(name, _TAKEN, n=1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else "settings of the session go into options=-c%20name=value"
            )
            raise _refused(f"{name[:64]!r} is no parameter that chiffon can use; {hint}")
        if not _TAKEN[name].fullmatch(value):
            raise _refused(f"{name}={value[:64]}: chiffon can use {_TAKEN[name].pattern}")


def _hosts(listed: str, said: str | None, ports: str | None) -> tuple[tuple[str, int] | None, ...]:
    """Return hosts and ports; those in the query count before those in the address."""
    pairs = [(host, None) for host in said.split(",")] if said else _pairs(listed)
    if not pairs:
        return (None,)
    own: list[str | None] = [one or None for one in (ports or "").split(",")]
    if len(own) not in (1, len(pairs)):
        raise _refused(f"port: {len(own)} ports for {len(pairs)} hosts")
    own *= len(pairs) // len(own)
    return tuple(
        _host(host, one or port or DEFAULT_PORT)
        for (host, port), one in zip(pairs, own, strict=True)
    )


def _pairs(listed: str) -> list[tuple[str, str | None]]:
    """Read ``host:port,[address]:port``; a port may be left out."""
    pairs: list[tuple[str, str | None]] = []
    for one in listed.split(",") if listed else ():
        found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]*))(?::(\d*))?", one)
        if found is None:
            raise _refused(
                "a bad port; in a user name or password, / is written %2F, @ %40 and : %3A"
            )
        pairs.append((found[1] or unquote(found[2] or ""), found[3] or None))
    return pairs


def _host(name: str, port: str | int) -> tuple[str, int]:
    if not name:
        raise _refused("a host without a name")
    if not str(port).isdecimal() or not 0 < int(port) < 65_536:
        raise _refused(f"a bad port for host {name}")
    return name, int(port)


def _settings(options: str) -> dict[str, str]:
    """Read ``options``, of which ``-c name=value`` and ``--name=value`` are taken."""
    try:
        words = iter(shlex.split(options))
    except ValueError as error:
        raise _refused(f"options: {error}") from None
    made = {}
    for word in words:
        text = next(words, "") if word == "-c" else re.sub(r"^(--|-c)", "", word)
        name, is_setting, value = text.partition("=")
        if not is_setting or text == word or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_.]*", name):
            raise _refused("options: only -c name=value and --name=value can be used")
        made[name] = value
    return made


def _refused(what: str) -> BadConfiguration:
    return BadConfiguration(f"CHIFFON_DATABASE_URL: {what}")
