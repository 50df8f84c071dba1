"""Commands as processes: mistakes, exit codes, and what needs no server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chiffon.contract.messages import SCALAR_METRICS
from tests.fixtures.command import run as chiffon

BROKER, DATABASE = "CHIFFON_AMQP_URL", "CHIFFON_DATABASE_URL"


def broker(url: str) -> dict[str, str]:
    return {"CHIFFON_AMQP_URL": url}


def database(url: str) -> dict[str, str]:
    return {"CHIFFON_DATABASE_URL": url}


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "said"),
    [
        (["capacity", "find", "--min-gpu-vram-gb", "nan"], {}, 2, "--min-gpu-vram-gb"),
        (["capacity", "find", "--min-gpu-vram-gb", "-1"], {}, 2, "--min-gpu-vram-gb"),
        (["capacity", "find", "--min-cpu-cores", "x"], {}, 2, "min-cpu-cores"),
        (["capacity", "find", "--agent-type", "toaster"], {}, 2, "--agent-type"),
        (["capacity", "find", "--limit", "0"], {}, 2, "--limit"),
        (["capacity", "show", "7"], {}, 2, "valid UUID"),
        (["nonsense"], {}, 2, "nonsense"),
        (["fleet", "watch", "-o", "json"], {}, 2, "jsonl"),
        (["fleet", "list"], {"CHIFFON_DATABSE_URL": "x"}, 78, "did you mean CHIFFON_DATABASE_URL"),
        (["fleet", "list"], {DATABASE: "mysql://a:hunter2@h/d"}, 78, "PostgreSQL"),
        (["db", "check"], {DATABASE: "postgresql://a:hunter2@h:abc/d"}, 78, "a bad port"),
        (["db", "check"], {DATABASE: "mysql://a:hunter2@h/d"}, 78, "PostgreSQL"),
        (["capacity", "find"], {BROKER: "amqp://a:hun/ter2@127.0.0.1:1/v"}, 78, "a bad port"),
        (
            ["fleet", "list"],
            {DATABASE: "postgresql://a:hunter2@127.0.0.1:1/d"},
            69,
            "database",
        ),
        (
            ["bus", "check"],
            {BROKER: "amqp://a:hunter2@127.0.0.1:1/"},
            69,
            "127.0.0.1:1",
        ),
        (["bus", "check"], {BROKER: "http://a:hunter2@h/"}, 78, "AMQP URL"),
        (
            ["capacity", "find", "--timeout", "0.3"],
            {BROKER: "amqp://a:hunter2@127.0.0.1:1/"},
            69,
            "127.0.0.1:1",
        ),
        (["agent", "run", "--heartbeat-interval-seconds", "0"], {}, 78, "HEARTBEAT_INTERVAL"),
    ],
)
def test_a_mistake_is_one_clear_message_with_its_exit_code_and_no_password(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], code: int, said: str
) -> None:
    done = chiffon(*arguments, CHIFFON_STATE_DIR=str(tmp_path), **variables)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "hun" not in done.stderr


def test_probe_prints_exactly_the_body_that_would_be_sent(tmp_path: Path) -> None:
    from chiffon.contract.codec import decode_heartbeat

    done = chiffon(
        "agent", "probe", "-o", "json", "--pool-name", "lab", CHIFFON_STATE_DIR=str(tmp_path)
    )

    assert done.returncode == 0, done.stderr
    body = done.stdout.encode().strip()
    content = json.loads(body)
    key = f"heartbeat.lab.desktop.{content['agent_id']}"
    update = decode_heartbeat(body, key)
    assert (update.sequence, update.status) == (1, "online")
    assert content["resources"]["memory_available_gb"] > 0
    assert list(tmp_path.iterdir()) == [], "a probe leaves nothing behind"


def test_probe_tells_a_person_where_each_value_is_from(tmp_path: Path) -> None:
    done = chiffon(
        "agent",
        "probe",
        CHIFFON_STATE_DIR=str(tmp_path),
        CHIFFON_KEPT_MEMORY_GB="0.5",
        CHIFFON_OVERRIDE_GPU_TYPE="gaudi",
        CHIFFON_OVERRIDE_GPU_VRAM_TOTAL_GB="96",
    )

    assert done.returncode == 0, done.stderr
    heading, *lines = (line.split("\t") for line in done.stdout.splitlines())
    assert heading == ["FIELD", "VALUE", "IS", "FROM", "TOOK"]
    rows = {line[0]: line[1:] for line in lines}
    assert set(SCALAR_METRICS) <= set(rows)
    assert rows["cpu_percent"][1] == "detected"
    assert rows["cpu_percent"][2].startswith("/proc/stat, over ")
    assert rows["memory_available_gb"][2].endswith("0.5 GiB kept")
    assert rows["memory_available_gb"][3].endswith(" ms")
    assert rows["gpu_vram_total_gb"][:2] == ["96", "overridden"]
    assert rows["gpu_vram_available_gb"][:2] == ["-", "unknown"]
    assert rows["pool_name"] == ["default", "", "CHIFFON_POOL_NAME, its default", ""]


def test_the_schema_is_printed(tmp_path: Path) -> None:
    done = chiffon("schema", "jsonschema", CHIFFON_STATE_DIR=str(tmp_path))

    assert json.loads(done.stdout)["x-amqp-types"]["status_update.v1"]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "chiffon", "schema", "jsonschema"],
        env={**os.environ, "CHIFFON_STATE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        said = running.stderr.read()

    assert running.returncode == 0
    assert said == ""
