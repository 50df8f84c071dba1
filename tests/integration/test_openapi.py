"""The gateway's description of itself, and whether it tells the truth."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from chiffon.capacity.fleet import Agent, Fleet
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import AgentCapacity, Offer
from chiffon.gateway import examples
from chiffon.gateway.api import CapacityAnswer
from chiffon.gateway.app import openapi
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures.gateway import serving
from tests.fixtures.heartbeats import update

PROJECT = Path(__file__).parents[2]


def test_the_frozen_description_is_what_the_gateway_says() -> None:
    """A change of the API shows in a review: write it down with ``make openapi``."""
    frozen = json.loads((PROJECT / "docs" / "openapi.json").read_text())

    assert openapi() == frozen


def test_every_route_says_what_it_answers_with() -> None:
    described = openapi()

    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert operation["tags"], path
            assert operation["summary"], path
            assert operation["description"], path
            assert "422" not in operation["responses"], path
            if path.startswith("/api/"):
                for status in ("400", "500"):
                    content = operation["responses"][status]["content"]
                    assert "example" in content["application/problem+json"], (path, status)
    assert described["paths"]["/api/v1/agents/available-capacity"]["get"]["tags"] == ["agents"]
    assert "Retry-After" in str(described["paths"]["/api/v1/agents"]["get"]["responses"]["503"])


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        (AgentCapacity, examples.AGENT_CAPACITY),
        (Offer, examples.OFFER),
        (Agent, examples.AGENT),
        (Fleet, examples.FLEET),
        (CapacityAnswer, examples.CAPACITY),
    ],
)
def test_an_example_is_an_answer(kind: type[BaseModel], example: dict[str, Any]) -> None:
    read = kind.model_validate_json(json.dumps(example))

    assert set(read.model_dump()) == set(example)


@pytest.mark.parametrize(
    ("method", "phases", "examples"),
    [
        ("GET", "examples,fuzzing", 5),
        ("POST", "examples,fuzzing", 5),
        # Every corner of a body of twenty fields takes most of a minute, and found nothing.
        pytest.param("GET", "examples,coverage,fuzzing", 100, marks=pytest.mark.deep),
        pytest.param("POST", "examples,fuzzing", 100, marks=pytest.mark.deep),
    ],
)
async def test_no_request_at_all_makes_the_gateway_fail(
    broker: str,
    database_url: str,
    registry: Registry,
    database: Any,
    tmp_path: Path,
    method: str,
    phases: str,
    examples: int,
) -> None:
    """Schemathesis makes requests up from the description, good ones and bad ones."""
    agent_id = update().agent_id
    await registry.heartbeats.record(
        [Received(update(agent_id), asyncio.get_running_loop().time())]
    )
    await database.execute(
        """INSERT INTO agent_registry (agent_id, agent_type, pool_name, status, resource_metrics)
           VALUES (gen_random_uuid(), 'toaster', 'a b', 'online', '{"gpus": 3, "cpu_percent": {}}'),
                  (gen_random_uuid(), 'code', 'lab', 'busy', '7')"""
    )
    async with serving(broker, database_url) as http:
        done = await asyncio.to_thread(
            subprocess.run,
            [
                str(Path(sys.executable).with_name("schemathesis")),
                "run",
                f"{http.base_url}/openapi.json",
                *("--include-method", method),
                *("--phases", phases),
                *("--max-examples", str(examples)),
                *("--seed", "1"),
                *("--checks", "all"),
                # A text may hold what is no number of ours and yet of the schema's type.
                *("--exclude-checks", "positive_data_acceptance"),
                *("--warnings", "off"),
                "--no-color",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )

    assert done.returncode == 0, done.stdout[-6_000:]
    assert await OrchestratorService(registry).agent(agent_id)
