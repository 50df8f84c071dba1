"""``chiffon up``: the whole system on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fixtures.servers import Servers
from tests.fixtures.up import Running, chiffon, state_folder
from tests.system.test_readme import README, program


@pytest.fixture
def state() -> Iterator[Path]:
    with state_folder() as folder:
        yield folder


def wait_until_gone(processes: list[psutil.Process], seconds: float = 30.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


def test_a_killed_up_takes_its_children_with_it_and_the_next_one_shows_this_machine(
    state: Path,
) -> None:
    """On private servers, from nothing, and then on what the kill has left.

    Two brokers and two databases start, one after the other.
    """
    running = Running(state)
    try:
        running.ready()
        addresses = state / "up.env"
        assert addresses.stat().st_mode & 0o777 == 0o600
        children = running.children()
        names = " ".join(" ".join(child.cmdline()) for child in children)
        assert all(word in names for word in ("beam", "postgres", "epmd", "orchestrator", "agent"))

        listed = chiffon("fleet", "list", "-o", "json", state=state)
        assert listed.returncode == 0, listed.stderr
        assert len(json.loads(listed.stdout)) == 1
        example = subprocess.run(
            [sys.executable, "-c", program(README, "planner.find")],
            env={**os.environ, "CHIFFON_STATE_DIR": str(state)},
            capture_output=True,
            text=True,
        )
        assert "of the fleet can take it now" in example.stdout, example.stderr
        second = chiffon("up", "--once", state=state)
        assert second.returncode == 75
        assert "runs already" in second.stderr

        running.process.kill()
        wait_until_gone(children)
    finally:
        running.end()

    assert addresses.exists()
    stale = chiffon("fleet", "list", state=state)
    assert "up.env is stale" in stale.stderr
    shows_this_machine(state)


def shows_this_machine(state: Path) -> None:
    done = chiffon("up", "--once", "-o", "json", state=state)

    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    made = json.loads(line)
    assert set(made) == {"agents", "offers", "urls"}
    [agent], [offer] = made["agents"], made["offers"]["agents"]
    assert agent["agent_id"] == offer["agent_id"]
    assert agent["resources"]["memory_available_gb"] > 0
    assert set(made["urls"]) == {"amqp", "database", "http", "management"}
    assert all("***" in url for name, url in made["urls"].items() if name != "http")
    assert not (state / "up.env").exists()
    passwords = [path.read_text().strip() for path in state.glob("*/password")]
    assert len(passwords) == 2
    written = done.stdout + done.stderr + "".join(path.read_text() for path in state.glob("*.log"))
    assert not [password for password in passwords if password in written]


def test_up_uses_given_servers_restarts_what_ends_and_ends_in_order(
    servers: Servers, amqp_url: str, database_url: str, state: Path
) -> None:
    """Whole processes start, and start again after a pause."""
    given = {"CHIFFON_AMQP_URL": amqp_url, "CHIFFON_DATABASE_URL": database_url}
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    running = Running(state, **given, CHIFFON_HTTP_PORT=port)
    try:
        made = running.ready()
        assert not made["urls"]["http"].endswith(f":{port}")
        answer = httpx.get(f"{made['urls']['http']}/api/v1/agents", trust_env=False)
        assert len(answer.json()["agents"]) == 1
        own = made["agents"][0]["agent_id"]
        children = running.children()
        assert not [child for child in children if "postgres" in child.name()]
        [agent] = [child for child in children if "agent" in child.cmdline()]
        before = incarnation(state)

        agent.kill()
        deadline = time.monotonic() + 60
        while incarnation(state) == before:
            assert time.monotonic() < deadline, "the agent was not restarted"
            time.sleep(0.05)

        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0
        wait_until_gone(children)
    finally:
        running.end()
        taken.close()

    assert "restarting" in (state / "up.stderr").read_text()
    listed = chiffon("fleet", "show", own, "-o", "json", state=state, **given)
    assert json.loads(listed.stdout)["status"] == "offline", "its farewell was recorded"


def incarnation(state: Path) -> int:
    return int(json.loads((state / "agent.json").read_text())["incarnation"])


def test_up_says_what_failed_with_the_end_of_its_log(amqp_url: str, state: Path) -> None:
    """A broker and a database start."""
    (state / "agent.json").write_text("damaged")

    done = chiffon("up", "--once", state=state, CHIFFON_AMQP_URL=amqp_url)

    assert done.returncode != 0
    assert "agent" in done.stderr
    assert "agent.json is not readable" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_machine_without_rabbitmq_is_told_what_to_do(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a process of its own."""
    program = (
        "import sys; from chiffon.embedded import rabbitmq\n"
        "rabbitmq._SERVERS = (); rabbitmq.shutil.which = lambda name: None\n"
        "from chiffon.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "up", "--once"],
        env={**os.environ, "CHIFFON_STATE_DIR": str(state)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 78
    assert "apt-get install" in done.stderr
    assert "Traceback" not in done.stderr
