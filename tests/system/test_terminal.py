"""What a person sees on terminals of all kinds, and what becomes of streams that fail."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures import command
from tests.fixtures.heartbeats import update

HOSTS = ("render-farm-07", "müller-🚀", "rig-1")


@pytest.fixture
async def fleet(registry: Registry, database_url: str, tmp_path: Path) -> dict[str, str]:
    """Three agents; the environment of a command that shows them."""
    updates = [update(hostname=name) for name in HOSTS]
    received = [Received(one, time.monotonic()) for one in updates]
    await registry.heartbeats.record(sorted(received, key=lambda one: one.update.agent_id))
    await registry.path.mark_fresh(time.monotonic())
    return {
        **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
        "CHIFFON_DATABASE_URL": database_url,
        "CHIFFON_AMQP_URL": "amqp://nobody:x@127.0.0.1:1/",
        "CHIFFON_STATE_DIR": str(tmp_path),
    }


async def on_terminal(
    environment: dict[str, str], columns: int, *arguments: str, **variables: str
) -> tuple[int, str]:
    """Run a command on a terminal of so many columns; returns its exit code and what it shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chiffon", *arguments),
        env={**environment, "TERM": "xterm-256color", **variables},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)

    def read() -> bytes:
        parts = []
        while True:
            try:
                part = os.read(master, 65_536)
            except OSError:  # so a terminal says that nobody writes to it any more
                break
            if not part:
                break
            parts.append(part)
        return b"".join(parts)

    shown = await asyncio.to_thread(read)
    os.close(master)
    code = await process.wait()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "")
    # The canary of these tests is fresh for 5 s only.
    return code, re.sub(r"(?m)^degraded: .*\n", "", text)


async def test_at_80_columns_what_matters_is_whole(fleet: dict[str, str]) -> None:
    code, shown = await on_terminal(fleet, 80, "fleet", "list")

    heading, *rows, more = shown.strip().splitlines()
    assert code == 0
    for title in ("HOST", "STATUS", "FREE CORES", "FREE/TOTAL VRAM", "GPU"):
        assert title in heading
    assert all(len(line) <= 80 for line in (heading, *rows))
    assert {row.split()[0] for row in rows} == set(HOSTS)
    assert all("20.5/24.0 GiB" in row and "nvidia" in row for row in rows)
    assert re.search(r"columns more with --wide", more)


async def test_an_id_is_short_where_that_tells_agents_apart(
    fleet: dict[str, str], registry: Registry
) -> None:
    ids = {str(row.agent_id) for row in await registry.agents.list(None, None, None)}

    _, shown = await on_terminal(fleet, 400, "fleet", "list", "--columns", "agent,host")
    _, whole = await on_terminal(fleet, 80, "fleet", "list", "--wide")
    piped = await run(fleet, "fleet", "list")

    assert {row.split()[0] for row in shown.strip().splitlines()[1:]} == {one[:8] for one in ids}
    assert all(one in whole.replace("\n", "") for one in ids)
    assert all(one in piped.stdout for one in ids)


async def test_columns_are_those_that_are_named(fleet: dict[str, str]) -> None:
    code, shown = await on_terminal(fleet, 80, "fleet", "list", "--columns", "gpu,host")
    wrong = await run(fleet, "fleet", "list", "--columns", "gpus")

    assert code == 0
    assert shown.splitlines()[0].split() == ["GPU", "HOST"]
    assert wrong.returncode == 2
    assert "there are host, pool, type" in wrong.stderr


@pytest.mark.parametrize(
    ("columns", "terminal"),
    [(40, "xterm"), (400, "xterm"), (1, "dumb"), (40, "no-such-terminal"), (80, "")],
)
async def test_no_terminal_is_too_odd(fleet: dict[str, str], columns: int, terminal: str) -> None:
    code, shown = await on_terminal(fleet, columns, "fleet", "list", TERM=terminal)

    assert code == 0
    assert "Traceback" not in shown
    assert "render-farm-07" in shown.replace("\n", "")


async def test_the_watch_fits_too(fleet: dict[str, str]) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chiffon", "fleet", "watch"),
        env={**fleet, "TERM": "xterm"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while b"GPU" not in shown or b"rig-1" not in shown:
        shown += await asyncio.to_thread(os.read, master, 65_536)
    process.terminate()
    await process.wait()
    os.close(master)

    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "").splitlines()
    [heading] = [line for line in lines if line.startswith("HOST")][:1]
    assert "FREE/TOTAL VRAM" in heading
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
async def test_letters_that_an_encoding_lacks_are_escaped(
    fleet: dict[str, str], encoding: str
) -> None:
    done = await run(fleet, "fleet", "list", "--columns", "host", PYTHONIOENCODING=encoding)

    assert done.returncode == 0, done.stderr
    assert ("-🚀" in done.stdout) == (encoding == "utf-8")
    assert (r"\U0001f680" in done.stdout) == (encoding != "utf-8")
    assert "Traceback" not in done.stderr


SHELL: list[tuple[str, int]] = [
    ("fleet list >&-", 0),
    ("fleet list >&- 2>&-", 0),
    ("fleet list </dev/null >/dev/full", 75),
    ("fleet list -o json >/dev/full", 75),
    ("fleet list -o jsonl >/dev/full 2>/dev/full", 75),
    ("--help >/dev/full", 75),
    ("nonsense 2>/dev/full", 75),
    ("fleet list --columns nonsense 2>&-", 2),
    ("capacity find --timeout 0.3 2>/dev/full", 69),
    ("capacity find --timeout 0.3 2>&-", 69),
    ("fleet list | true", 0),
    ("fleet watch | head -n 1", 0),
]


@pytest.mark.parametrize(("line", "code"), SHELL)
async def test_a_stream_that_fails_is_no_traceback(
    fleet: dict[str, str], tmp_path: Path, line: str, code: int
) -> None:
    errors = tmp_path / "errors"
    program = f"set -o pipefail; {sys.executable} -m chiffon {line}"
    with errors.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", program),
            env=fleet,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
        )
    async with asyncio.timeout(60):
        assert await process.wait() == code, errors.read_text()

    assert "Traceback" not in errors.read_text()
    assert "Exception ignored" not in errors.read_text()


BYTES: list[tuple[list[bytes], dict[str, bytes], int]] = [
    ([b"capacity", b"find", b"--pool-name", b"\xff"], {}, 2),
    ([b"fleet", b"list", b"--pool-name", b"\xff"], {}, 0),
    ([b"fleet", b"show", b"\xff\xfe"], {}, 3),
    ([b"fleet", b"drain", b"rig-1", b"--reason", b"\xffdisk\x1b[31m"], {}, 0),
    ([b"fleet", b"drain", b"rig-1", b"--deadline", b"\xff"], {}, 2),
    ([b"\xff"], {}, 2),
    ([b"fleet", b"list", b"--\xff"], {}, 2),
    ([b"agent", b"tie", b"\xff", b"1"], {}, 2),
    ([b"capacity", b"reserve", b"--cpu-cores", b"1", b"--holder", b"\xff"], {}, 2),
    (
        [b"capacity", b"reserve", b"--cpu-cores", b"1", b"--timeout", b"0.3"],
        {"USER": b"\xff", "LOGNAME": b"\xff"},
        69,
    ),
    ([b"capacity", b"reserve", b"--alternative", b"\xff"], {}, 2),
    ([b"agent", b"probe"], {"CHIFFON_POOL_NAME": b"\xff"}, 78),
    ([b"agent", b"probe"], {"CHIFFON_CAPABILITIES": b"a,\xff"}, 78),
    ([b"fleet", b"list"], {"CHIFFON_DATABASE_URL": b"postgresql://a:\xff@h/x"}, 78),
    ([b"capacity", b"find"], {"CHIFFON_AMQP_URL": b"amqp://a:\xff@h/"}, 78),
    ([b"fleet", b"list"], {"CHIFFON_\udcff": b"1"}, 78),
    ([b"agent", b"probe"], {"CHIFFON_STATE_DIR": b"/tmp/\xff-chiffon"}, 0),
    ([b"fleet", b"list"], {"LANG": b"\xff", "COLUMNS": b"\xff", "TERM": b"\xff"}, 0),
]


@pytest.mark.parametrize(("arguments", "variables", "code"), BYTES)
async def test_bytes_that_are_no_text_are_told_or_shown(
    fleet: dict[str, str], arguments: list[bytes], variables: dict[str, bytes], code: int
) -> None:
    ours = {name: value for name, value in fleet.items() if name.startswith("CHIFFON_")}
    given = {name: os.fsdecode(value) for name, value in variables.items()}

    done = await asyncio.to_thread(command.run, *map(os.fsdecode, arguments), **{**ours, **given})

    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file", ["up.env", "agent.json"])
async def test_files_that_hold_no_text_are_told_of(
    fleet: dict[str, str], tmp_path: Path, file: str
) -> None:
    (tmp_path / file).write_bytes(b"\xff\x00\xfe")

    done = await run(fleet, "agent", "probe")

    assert done.returncode in (0, 78)
    assert "Traceback" not in done.stderr


async def run(environment: dict[str, str], *arguments: str, **variables: str) -> Any:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "chiffon", *arguments],
        env={**environment, **variables},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
    )
