"""Each extra alone, from the built wheel: with the packages that it brings, and no others."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=PROJECT,
        check=True,
        capture_output=True,
    )
    [built] = folder.glob("*.whl")
    return built


class Installed:
    """A Python that sees one folder of packages and its own library."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CHIFFON_")
        }
        return subprocess.run(
            [sys.executable, "-S", *arguments],  # without the packages that it has itself
            env={**environment, "PYTHONPATH": str(self._folder), "CHIFFON_STATE_DIR": "/nowhere"},
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def says(self, code: int, said: str, *arguments: str) -> None:
        """Check what is said, and that it is no traceback."""
        done = self.run(*arguments)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def install(wheel: Path, folder: Path, extra: str) -> Installed:
    """Put the wheel into a folder, and links to what it needs with this extra."""
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)
    [metadata] = folder.glob("chiffon-*.dist-info/METADATA")
    wanted = [
        line.partition(": ")[2]
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    for name in packages(wanted, extra):
        package = distribution(name)
        for entry in set(top_level(package.files or [])):
            target = folder / entry
            if not target.exists():
                target.symlink_to(Path(str(package.locate_file(entry))))
    return Installed(folder)


def packages(wanted: Sequence[str], extra: str) -> set[str]:
    """Return the packages that are needed with this extra, and those that they need."""
    done: set[tuple[str, str]] = set()
    pending = [(Requirement(one), extra) for one in wanted]
    while pending:
        one, of_extra = pending.pop()
        is_wanted = one.marker is None or one.marker.evaluate({"extra": of_extra})
        key = (one.name, ",".join(sorted(one.extras)))
        if not is_wanted or key in done:
            continue
        done.add(key)
        inner = wanted if one.name == "chiffon" else requires(one.name)
        pending += [(Requirement(text), name) for name in ("", *one.extras) for text in inner]
    return {name for name, _ in done if name != "chiffon" and requires(name) is not NOT_HERE}


NOT_HERE: list[str] = []


def requires(name: str) -> list[str]:
    """Return what a package needs; it is not here if it is for another platform."""
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return NOT_HERE


def top_level(files: object) -> Iterator[str]:
    for file in files:  # type: ignore[attr-defined]
        first = file.parts[0]
        if first not in ("..", "__pycache__") and not first.endswith(".pth"):
            yield first


AWAY = ("CHIFFON_AMQP_URL", "amqp://u:p@127.0.0.1:1/")


def test_an_agent_and_a_planner_need_no_extra(wheel: Path, tmp_path: Path) -> None:
    here = install(wheel, tmp_path, "")

    here.says(0, "Run chiffon's agent until SIGTERM", "-m", "chiffon.agent", "--help")
    here.says(0, "", "-c", "from chiffon import BaseAgent, PlannerClient, CapacityQuery")
    here.says(2, "unrecognized arguments: --pool", "-m", "chiffon.agent", "--pool")
    here.says(78, "pip install 'chiffon[cli]'", "-m", "chiffon", "fleet", "list")
    orchestrator = "pip install 'chiffon[orchestrator]'"
    here.says(78, orchestrator, "-m", "chiffon.orchestrator")
    here.says(0, "Run chiffon's orchestrator", "-m", "chiffon.orchestrator", "--help")
    here.says(78, "pip install", "-m", "chiffon.gateway")
    done = here.run("-c", "from chiffon import Registry")
    assert done.stderr.rstrip().endswith(
        f"ImportError: chiffon.Registry needs more: asyncpg is not installed: {orchestrator}"
    )


def test_the_command_line_alone_says_which_extra_a_command_needs(
    wheel: Path, tmp_path: Path
) -> None:
    here = install(wheel, tmp_path, "cli")

    for command in ("--help", "fleet --help", "up --help", "gateway run --help"):
        here.says(0, "Usage", "-m", "chiffon", *command.split())
    here.says(0, "agent_id", "-m", "chiffon", "agent", "probe")
    here.says(0, '"$defs"', "-m", "chiffon", "schema", "jsonschema")
    here.says(69, "cannot reach the broker", "-m", "chiffon", "bus", "check")
    for command in (
        *("fleet list", "fleet forget x", "db upgrade", "db check", "orchestrator run"),
        *("simulate --seconds 30", "up --once"),
    ):
        here.says(78, "pip install 'chiffon[orchestrator]'", "-m", "chiffon", *command.split())
    for command in ("gateway run", "schema openapi"):
        here.says(78, "pip install 'chiffon[", "-m", "chiffon", *command.split())


def test_an_orchestrator_needs_no_command_line(wheel: Path, tmp_path: Path) -> None:
    here = install(wheel, tmp_path, "orchestrator")

    here.says(
        *(0, "None", "-c"),
        "import asyncio, chiffon.orchestrator.process as one, chiffon.registry.migrations as two;"
        "print(two.head() and None)",
    )
    here.says(0, "Run chiffon's orchestrator", "-m", "chiffon.orchestrator", "--help")
    here.says(78, "pip install 'chiffon[gateway]'", "-m", "chiffon.gateway")


def test_a_gateway_needs_no_command_line(wheel: Path, tmp_path: Path) -> None:
    here = install(wheel, tmp_path, "gateway")

    here.says(0, "Run chiffon's gateway", "-m", "chiffon.gateway", "--help")
    here.says(
        *(0, "/api/v1/agents", "-c"),
        "from chiffon.gateway.app import openapi; print(list(openapi()['paths']))",
    )


def test_all_has_every_command(wheel: Path, tmp_path: Path) -> None:
    here = install(wheel, tmp_path, "all")

    here.says(0, '"openapi"', "-m", "chiffon", "schema", "openapi")
    here.says(69, "the database failed us", "-m", "chiffon", "fleet", "list")


@pytest.mark.parametrize("extra", ["embedded", "all"])
def test_what_up_needs_comes_with_its_extra(wheel: Path, tmp_path: Path, extra: str) -> None:
    here = install(wheel, tmp_path, extra)

    here.says(0, "", "-c", "import chiffon.embedded.up, chiffon.cli.up, chiffon.gateway.process")
