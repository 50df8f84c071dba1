"""The statements of the folder ``sql``, by their names.

A file holds blocks that begin with ``-- name:`` or ``-- fragment:``. Parameters are written
``:name``; a fragment is put in place of its name in braces. The constants of lease arithmetic are
written in as numbers, so that they stand once, in ``contract.lease``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from chiffon.contract import lease

_CONSTANTS: Mapping[str, float] = {
    "canary_fresh_seconds": lease.CANARY_FRESH_SECONDS,
    "future_seconds": lease.FUTURE_SECONDS,
    "longest_lease_seconds": lease.lease_for(lease.LONGEST_INTERVAL_SECONDS),
    "offline_after_leases": lease.offline_after(1.0),
    "time_to_renew_seconds": lease.TIME_TO_RENEW_SECONDS,
}
_BLOCK = re.compile(r"^-- (name|fragment): (\w+)\n", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)
_FRAGMENT = re.compile(r"\{([a-z_]+)\}")
_PARAMETER = re.compile(r"(?<!:):([a-z][a-z_]*)")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement as PostgreSQL takes it, and the names of its parameters in order."""

    name: str
    text: str
    parameters: tuple[str, ...]

    def arguments(self, given: Mapping[str, Any]) -> list[Any]:
        """Return the arguments in the order of the parameters.

        Raises:
            TypeError: One is missing, or is not a parameter of this statement.
        """
        if given.keys() != set(self.parameters):
            raise TypeError(f"{self.name} takes {self.parameters}, not {tuple(given)}")
        return [given[name] for name in self.parameters]


def _blocks() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {"name": {}, "fragment": {}}
    for file in files("chiffon.registry").joinpath("sql").iterdir():
        _, *parts = _BLOCK.split(file.read_text("utf-8"))
        for kind, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            if name in found[kind]:
                raise ValueError(f"{file.name}: there are two of {name}")
            found[kind][name] = _COMMENT.sub("", text).strip()
    return found


def _load() -> dict[str, Statement]:
    blocks = _blocks()
    statements = {}
    for name, text in blocks["name"].items():
        while _FRAGMENT.search(text):
            text = _FRAGMENT.sub(lambda match: blocks["fragment"][match[1]], text)
        parameters: list[str] = []

        def number(match: re.Match[str], known: list[str] = parameters) -> str:
            parameter = match[1]
            if parameter in _CONSTANTS:
                return f"{_CONSTANTS[parameter]!r}"
            if parameter not in known:
                known.append(parameter)
            return f"${known.index(parameter) + 1}"

        text = _PARAMETER.sub(number, text)
        statements[name] = Statement(name, text, tuple(parameters))
    return statements


STATEMENTS = _load()
"""Every statement that the registry runs."""
