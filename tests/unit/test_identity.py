"""Who an agent is, over restarts."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from chiffon.agent import identity
from chiffon.errors import StateUnavailable


def test_an_agent_is_the_same_after_a_restart_and_its_incarnation_grows(tmp_path: Path) -> None:
    with identity.open_identity(tmp_path) as first:
        pass
    with identity.open_identity(tmp_path) as second:
        pass

    assert second.agent_id == first.agent_id
    assert second.incarnation > first.incarnation


def test_the_incarnation_grows_also_when_the_clock_was_set_back(tmp_path: Path) -> None:
    with identity.open_identity(tmp_path) as first:
        pass
    future = first.incarnation + 10**12
    (tmp_path / "agent.json").write_text(
        json.dumps({"agent_id": str(first.agent_id), "incarnation": future})
    )

    with identity.open_identity(tmp_path) as second:
        assert second.incarnation == future + 1


def test_two_agents_cannot_share_a_state_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from chiffon.agent import identity\n"
        "with identity.open_identity(Path(sys.argv[1])): pass"
    )
    with identity.open_identity(tmp_path):
        second = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
        )

    assert second.returncode != 0
    assert "another agent runs on the state folder" in second.stderr


def test_looking_does_not_claim(tmp_path: Path) -> None:
    assert identity.peek(tmp_path) is None
    with identity.open_identity(tmp_path) as mine:
        assert identity.peek(tmp_path) == mine


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"agent_id": "x", "incarnation": 1}',
        '{"agent_id": 5, "incarnation": 1}',
        '{"agent_id": "6e5b0a3e-3c1e-4f0e-9f3a-0c5b1c9d7a11", "incarnation": Infinity}',
    ],
)
def test_a_damaged_file_is_named_and_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "agent.json").write_text(content)

    with pytest.raises(StateUnavailable, match=r"agent\.json"), identity.open_identity(tmp_path):
        pass

    assert (tmp_path / "agent.json").read_text() == content


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with (
        pytest.raises(StateUnavailable, match="cannot be used"),
        identity.open_identity(tmp_path / "file"),
    ):
        pass


def forbid_writes() -> None:
    """Let the kernel refuse every byte that this process writes to a file, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_an_identity_that_cannot_be_written_is_used_where_it_can_be_read(tmp_path: Path) -> None:
    with identity.open_identity(tmp_path) as kept:
        pass
    program = (
        "import sys; from pathlib import Path; from chiffon.agent import identity\n"
        "with identity.open_identity(Path(sys.argv[1])) as mine:\n"
        "  print(mine.agent_id, mine.incarnation)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        preexec_fn=forbid_writes,
        capture_output=True,
        text=True,
    )

    agent_id, incarnation = done.stdout.split()
    assert agent_id == str(kept.agent_id)
    assert int(incarnation) > kept.incarnation
    assert "cannot be written: File too large" in done.stderr
    assert identity.peek(tmp_path) == kept


def test_where_nothing_can_be_read_an_agent_that_would_be_forgotten_is_not_made(
    tmp_path: Path,
) -> None:
    program = (
        "import sys; from pathlib import Path; from chiffon.agent import identity\n"
        "with identity.open_identity(Path(sys.argv[1])): pass"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        preexec_fn=forbid_writes,
        capture_output=True,
        text=True,
    )

    assert "StateUnavailable" in done.stderr
    assert "cannot be used: File too large" in done.stderr
