"""The model of a simulation: that it is content with the truth, and with nothing else."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

import pytest

from chiffon.contract.messages import CapacityOffers, CapacityQuery, Offer, ResourceMetrics
from chiffon.registry.rows import AgentRow
from chiffon.simulate.model import (
    Difference,
    Expected,
    missed_events,
    of_events,
    of_offers,
    of_rows,
)
from chiffon.simulate.profiles import PROFILES, Host
from tests.fixtures.heartbeats import update

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID(int=1)


def agent(number: int = 1, **fields: Any) -> Expected:
    """One that said two things, the newest of them ``fields``."""
    made = Expected(UUID(int=number), skew_seconds=10.0)
    made.confirm(update(made.agent_id, sequence=1, resources={"cpu_cores_available": 1}))
    made.confirm(update(made.agent_id, sequence=2, **fields))
    return made


def row(of: Expected, **fields: Any) -> AgentRow:
    """The row that the registry must have of it."""
    assert of.newest is not None
    newest = of.newest
    made = AgentRow(
        agent_id=of.agent_id,
        agent_type=newest.agent_type,
        pool_name=newest.pool_name,
        capabilities=newest.capabilities,
        status=newest.status,
        hostname=newest.hostname,
        agent_version=None,
        incarnation=newest.incarnation,
        sequence=newest.sequence,
        sent_at=NOW + timedelta(seconds=10),
        interval_seconds=newest.interval_seconds,
        lease_seconds=15.0,
        drained=False,
        last_heartbeat_at=NOW,
        resource_metrics=of.recent[-1].model_dump(mode="json"),
        performance_score=0.0,
        status_reason="farewell" if newest.is_farewell else None,
        status_changed_at=NOW,
        lower_incarnations=0,
        lower_incarnation_at=None,
        age_seconds=1.0,
        clock_skew_seconds=10.2,
        queue_delay_seconds=None,
        is_silent=False,
    )
    return replace(made, **fields)


def differences(of: Expected, *rows: AgentRow, is_outage: bool = False) -> list[Difference]:
    return list(of_rows([of], rows, is_outage=is_outage))


def test_the_truth_is_no_difference() -> None:
    one = agent()
    assert differences(one, row(one)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence": 1},
        {"sequence": 3},
        {"incarnation": 7},
        {"status": "busy"},
        {"status": "offline", "status_reason": "missed 4 heartbeats"},
        {"pool_name": "other"},
        {"agent_type": "code"},
        {"hostname": "other"},
        {"capabilities": ["gpu"]},
        {"interval_seconds": 6.0},
        {"resource_metrics": {}},
        {"clock_skew_seconds": 40.0},
        {"clock_skew_seconds": None},
    ],
)
def test_every_field_that_is_wrong_is_a_difference(wrong: dict[str, Any]) -> None:
    one = agent()
    assert differences(one, row(one, **wrong))


def test_older_metrics_than_the_last_are_a_difference() -> None:
    one = agent()
    assert differences(one, row(one, resource_metrics=one.recent[0].model_dump(mode="json")))


def test_an_agent_that_is_missing_and_one_that_nobody_simulated_are_differences() -> None:
    one, other = agent(1), agent(2)
    assert [found.where for found in differences(one, row(other))] == [
        str(one.agent_id),
        str(other.agent_id),
    ]


def test_an_older_heartbeat_that_is_confirmed_later_changes_nothing() -> None:
    one = agent()
    one.confirm(update(one.agent_id, sequence=1, resources={"cpu_cores_available": 9}))
    assert one.newest is not None
    assert one.newest.sequence == 2
    assert one.recent[-1].cpu_cores_available == 14


def test_a_silent_agent_must_be_offline_unless_so_many_are() -> None:
    one = agent()
    one.is_silent = True
    assert differences(one, row(one))
    assert differences(one, row(one), is_outage=True) == []
    marked = row(one, status="offline", status_reason="missed 4 heartbeats")
    assert differences(one, marked) == []
    assert differences(one, marked, is_outage=True)


def test_an_agent_that_left_keeps_what_it_said_before() -> None:
    one = agent(status="offline", resources=None)
    assert one.newest is not None
    assert one.newest.is_farewell
    assert differences(one, row(one)) == []
    assert differences(one, row(one, status_reason="missed 4 heartbeats"))
    assert differences(one, row(one, resource_metrics={}))


def offers(*agents: Expected, **fields: Any) -> CapacityOffers:
    made = [
        Offer(
            agent_id=one.agent_id,
            agent_type="desktop",
            pool_name="default",
            hostname="rig-7",
            status="online",
            performance_score=0.0,
            last_heartbeat_at=NOW,
            heartbeat_age_seconds=1.0,
            **{name: getattr(one.recent[-1], name) for name in _METRICS},
        )
        for one in agents
    ]
    found = {"total_matches": len(made), "total_relation": "eq", "degraded": False, **fields}
    return CapacityOffers(as_of=NOW, agents=made, **found)


_METRICS = sorted(set(ResourceMetrics.model_fields) & set(Offer.model_fields))


def asked(fleet: list[Expected], answer: CapacityOffers, **needs: Any) -> list[Difference]:
    return list(of_offers(fleet, CapacityQuery(**needs), answer, is_outage=False))


def test_offers_are_all_that_fit_best_first() -> None:
    big, small = agent(1), agent(2, resources={"gpu_vram_available_gb": 2.0})
    silent, busy = agent(3), agent(4, status="busy")
    silent.is_silent = True
    fleet = [small, busy, silent, big]

    assert asked(fleet, offers(big, small)) == []
    assert asked(fleet, offers(big), min_gpu_vram_gb=4.0) == []
    assert asked(fleet, offers(big, total_relation="gte"), limit=1) == []
    assert asked(fleet, offers(small, big)), "out of order"
    assert asked(fleet, offers(big)), "one is missing"
    assert asked(fleet, offers(big, small, busy)), "a busy one"
    assert asked(fleet, offers(big, silent, small)), "a silent one"
    assert asked(fleet, offers(big, small, total_matches=3)), "a wrong count"
    assert asked(fleet, offers(), min_gpu_vram_gb=4.0), "none at all"


def test_an_offer_with_other_metrics_than_were_sent_is_a_difference() -> None:
    one, other = agent(1), agent(1, resources={"cpu_cores_available": 15})
    assert asked([one], offers(other))


def test_an_answer_in_an_outage_must_say_so() -> None:
    one = agent()
    assert list(of_offers([one], CapacityQuery(), offers(one), is_outage=True))
    degraded = offers(one, degraded=True)
    assert list(of_offers([one], CapacityQuery(), degraded, is_outage=True)) == []


def test_being_told_offline_too_often_is_a_difference_and_too_seldom_is_counted() -> None:
    one = agent()
    one.farewells = 1
    one.is_silent = True
    assert list(of_events([one], {ID: 2}, is_outage=False)) == []
    assert list(of_events([one], {ID: 3}, is_outage=False))
    assert list(of_events([one], {ID: 2}, is_outage=True))
    assert missed_events([one], {ID: 1}, is_outage=False) == 1
    assert missed_events([one], {}, is_outage=True) == 1


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_simulated_readings_fit_the_contract_and_are_the_same_for_the_same_seed(
    profile: Any,
) -> None:
    hosts = [Host("x", profile, Random("seed")) for _ in range(2)]
    for _ in range(200):
        one, other = (host.read() for host in hosts)
        assert one == other
        assert len(one.gpus) == profile.gpus
