"""Every error has its place in the tree, and an exit code."""

from uuid import uuid4

import pytest

from chiffon import errors
from chiffon.errors import (
    AgentNotFoundError,
    BadConfiguration,
    BusRefused,
    BusUnavailable,
    CapacityRefused,
    CapacityTimeout,
    ChiffonError,
    NoResponders,
    RegistryRefused,
    RegistryUnavailable,
    TablesMissing,
    TopologyMismatch,
    TopologyMissing,
    Unroutable,
    exit_code,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ChiffonError("x"), 1),
        (AgentNotFoundError(uuid4()), 3),
        (NoResponders("x"), 69),
        (BusUnavailable("x"), 69),
        (TopologyMissing("x"), 69),
        (Unroutable("x"), 69),
        (RegistryUnavailable("x"), 69),
        (CapacityTimeout("x"), 75),
        (BusRefused("x"), 77),
        (RegistryRefused("x"), 77),
        (BadConfiguration("x"), 78),
        (TablesMissing("x"), 78),
        (TopologyMismatch("x"), 78),
        (CapacityRefused("invalid_request", "x"), 2),
        (CapacityRefused("unavailable", "x"), 69),
        (CapacityRefused("expired", "x"), 75),
        (CapacityRefused("internal", "x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: ChiffonError, code: int) -> None:
    assert exit_code(error) == code


def test_the_tree_in_the_docstring_names_every_error() -> None:
    drawn = errors.__doc__ or ""
    kinds = [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, ChiffonError)
    ]

    assert [name for name in kinds if f"* {name}" not in drawn] == []
