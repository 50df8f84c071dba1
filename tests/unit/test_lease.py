"""Lease arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.contract.lease import FIRST_REDIAL_SECONDS, lease_for, offline_after, redial_delay


@pytest.mark.parametrize(
    ("interval", "lease", "offline"),
    [(0.5, 5.0, 20 / 3), (1.0, 5.0, 20 / 3), (5.0, 15.0, 20.0), (600.0, 1800.0, 2400.0)],
)
def test_a_lease_is_three_intervals_and_at_least_five_seconds(
    interval: float, lease: float, offline: float
) -> None:
    assert lease_for(interval) == lease
    assert offline_after(lease) == pytest.approx(offline)


@given(st.integers(0, 10_000), st.floats(0.1, 1_000), st.floats(0, 1, exclude_max=True))
def test_a_redial_is_quick_at_first_and_never_past_the_cap(
    attempt: int, cap: float, uniform: float
) -> None:
    assert 0 <= redial_delay(attempt, cap, uniform) < cap
    assert redial_delay(0, cap, uniform) < FIRST_REDIAL_SECONDS


def test_the_bound_of_the_pause_doubles_until_the_cap() -> None:
    bounds = [redial_delay(attempt, 5.0, 1.0) for attempt in range(6)]

    assert bounds == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
