"""The judgement of the sweep, as a table and as properties."""

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.orchestrator.silence import is_outage, is_over, judge, may_mark_one
from chiffon.registry.sweep import Outage, SilentPool


def pool(
    silent: int, members: int, *, due: int | None = None, marked: int = 0, unheard: int = 0
) -> SilentPool:
    """Return a pool of which so many are silent, all of them due unless said otherwise."""
    ids = [uuid4() for _ in range(silent if due is None else due)]
    return SilentPool("desks", silent, unheard, ids, marked, members)


@pytest.mark.parametrize(
    ("one", "is_one"),
    [
        (pool(2, 2), False),
        (pool(3, 3), True),
        (pool(11, 20), False),
        (pool(12, 20), True),
        (pool(55, 100), False),
        (pool(56, 100), True),
        (pool(9, 10, due=0), False),
        (pool(9, 10, due=1), True),
        (pool(1, 5, marked=5), True),
        (pool(1, 6, marked=4), False),
        (pool(3, 10, unheard=3), True),
        (pool(3, 12, unheard=3), False),
        (pool(2, 4, unheard=2), False),
    ],
)
def test_an_outage_is_more_than_the_share_and_more_than_two(one: SilentPool, is_one: bool) -> None:
    assert is_outage(one) == is_one


@pytest.mark.parametrize(
    ("silent", "members", "over"), [(0, 0, True), (3, 10, False), (2, 10, True), (25, 100, False)]
)
def test_an_outage_is_over_when_less_than_a_quarter_is_silent(
    silent: int, members: int, over: bool
) -> None:
    assert is_over(Outage("desks", 10.0, None, members, silent)) == over


@pytest.mark.parametrize(
    ("seconds", "last_marked", "may"),
    [(599.0, None, False), (601.0, None, True), (601.0, 0.5, False), (601.0, 1.5, True)],
)
def test_a_pool_that_went_home_is_marked_one_a_second_after_a_while(
    seconds: float, last_marked: float | None, may: bool
) -> None:
    assert may_mark_one(Outage("desks", seconds, last_marked, 10, 10), 600.0) == may


def test_few_who_are_silent_are_marked() -> None:
    one = pool(3, 10)

    verdict = judge([one], [])

    assert (verdict.mark, verdict.begin, verdict.end) == (list(one.due), [], [])


def test_while_an_outage_lasts_nobody_is_marked_and_it_begins_once() -> None:
    one = pool(9, 10)

    assert judge([one], []).begin == ["desks"]
    held = judge([one], [Outage("desks", 1.0, None, 10, 9)])
    assert (held.mark, held.begin, held.end) == ([], [], [])


def test_when_an_outage_is_over_those_who_are_left_have_a_lease_of_grace() -> None:
    verdict = judge([pool(2, 10)], [Outage("desks", 1e6, None, 10, 2)])

    assert (verdict.mark, verdict.begin, verdict.end) == ([], [], ["desks"])


POOLS = st.builds(
    lambda name, silent, others, due, marked, unheard: SilentPool(
        name,
        silent,
        min(unheard, silent),
        [UUID(int=number) for number in range(min(due, silent))],
        marked,
        silent + others,
    ),
    st.sampled_from("abc"),
    *([st.integers(0, 40)] * 5),
)
OUTAGES = st.builds(
    lambda name, seconds, last, silent, others: Outage(
        name, seconds, last, silent + others, silent
    ),
    st.sampled_from("abc"),
    st.floats(0, 2_000),
    st.none() | st.floats(0, 100),
    st.integers(0, 40),
    st.integers(0, 40),
)


@given(st.lists(POOLS, max_size=5), st.lists(OUTAGES, max_size=5))
def test_whatever_becomes_silent_most_of_a_pool_is_never_marked_at_once(
    pools: list[SilentPool], outages: list[Outage]
) -> None:
    pools = list({one.pool_name: one for one in pools}.values())
    outages = list({one.pool_name: one for one in outages}.values())
    held = {one.pool_name: one for one in outages}

    verdict = judge(pools, outages)

    assert not set(verdict.begin) & held.keys(), "an outage that lasts does not begin"
    assert set(verdict.end) <= held.keys()
    for one in pools:
        alone = judge([one], outages)
        if one.pool_name in held:
            assert len(alone.mark) <= 1
        elif one.silent + one.marked > 2:
            assert len(alone.mark) <= 0.55 * (one.members + one.marked)
        assert set(alone.mark) <= set(one.due), "nobody is marked who is not due"
