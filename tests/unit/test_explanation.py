"""Why agents are no offer, in words."""

from typing import Any
from uuid import uuid4

from chiffon.capacity.explanation import Asked, Count, Misfit, Misfits, explain
from chiffon.capacity.room import RULES, Wanted
from chiffon.contract.messages import CapacityQuery, CapacityReserve, Explanation, Needs

QUERY = CapacityQuery(
    min_gpu_vram_gb=40,
    min_cpu_cores=8,
    pool_name="lab",
    gpu_type="amd",
    capabilities=["ssd", "cuda12"],
)


class Counts(Misfits):
    """What was counted, without a fleet."""

    def __init__(self, query: Asked, counts: Any, nearest: Any) -> None:
        super().__init__(Wanted.of(query))
        for rule, agents, most, hostname in counts:
            if rule is None:
                self.fitting = agents
            else:
                self._counts[rule] = Count(agents, most, hostname)
        self.nearest = list(nearest)


def told(*counts: Any, nearest: Any = (), query: Asked = QUERY) -> Explanation:
    return explain(query, Counts(query, counts, nearest))


def test_no_agent_at_all_is_said_to_be_that() -> None:
    assert told().summary == "no agent is known"


def test_the_summary_counts_everybody_once_and_names_the_best() -> None:
    made = told(
        (None, 2, None, None),
        ("pool_name", 3, None, "elsewhere"),
        ("offline", 5, None, "gone"),
        ("min_gpu_vram_gb", 4, 30.0, "rig-7"),
        ("min_cpu_cores", 1, 0.0, "rig-8"),
    )

    assert made.summary == (
        "15 agents: 2 fit, 3 not in pool lab, 5 offline, "
        "4 too little free VRAM (best 30 of 40 on rig-7), 1 too few free cores"
    )
    assert (made.agents, made.fitting) == (15, 2)
    assert made.obstacles[2].model_dump(exclude={"message"}) == {
        "rule": "min_gpu_vram_gb",
        "agents": 4,
        "needed": 40.0,
        "most": 30.0,
        "hostname": "rig-7",
    }


def test_every_rule_has_words_of_its_own() -> None:
    asked = CapacityReserve(
        holder="a planner",
        idempotency_key=uuid4(),
        agent_id=uuid4(),
        gpu_vram_gb=40,
        gpus=2,
        **QUERY.model_dump(include=set(Needs.model_fields)),
    )
    words = {rule: told((rule, 1, None, None), query=asked).obstacles[0].message for rule in RULES}

    assert len(set(words.values())) == len(RULES)
    assert not [word for word in words.values() if "_" in word or "None" in word]
    assert words["capabilities"] == "without ssd and cuda12"


def test_what_is_too_little_by_a_hair_does_not_read_as_enough() -> None:
    assert "best 39.999 of 40" in told(("min_gpu_vram_gb", 1, 39.99999, "rig-7")).summary


def test_a_near_miss_has_all_its_reasons_with_what_it_has() -> None:
    found = Misfit(
        agent_id=uuid4(),
        hostname="rig-7",
        pool_name="default",
        agent_type="desktop",
        gpu_type="amd",
        capabilities_text="[]",
        broken=("pool_name", "min_gpu_vram_gb", "min_cpu_cores"),
        has={"min_gpu_vram_gb": 30.25, "min_cpu_cores": 4},
        order=(),
    )

    [miss] = told(nearest=[found]).nearest

    assert miss.reasons == [
        "not in pool lab",
        "too little free VRAM (30.25 of 40)",
        "too few free cores (4 of 8)",
    ]


def test_agents_that_only_the_filter_for_a_type_keeps_out_are_pointed_out() -> None:
    counts = Counts(QUERY, [("agent_type", 5, None, None)], [])
    counts.other_types.update({"infra": 2, "code": 1})

    made = explain(QUERY, counts)

    assert made.summary == (
        "5 agents: 5 not of type desktop (1 of type code, 2 of type infra would fit)"
    )
