"""A database whose certificate stops fitting, and one whose standby takes over."""

import asyncio
import os
import pwd
import shutil
import signal
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from chiffon.contract.messages import StatusUpdate
from chiffon.embedded import postgres
from chiffon.embedded.children import free_port, tie_to, unprivileged_user
from chiffon.embedded.postgres import asyncpg_url
from chiffon.registry import migrations
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.servers import execute
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until


@pytest.fixture
async def own_postgres() -> AsyncIterator[tuple[Path, postgres.Postgres]]:
    """A PostgreSQL of this test alone, and the folder that it lies in."""
    with tempfile.TemporaryDirectory(
        prefix="chiffon-database-", ignore_cleanup_errors=True
    ) as name:
        os.chmod(name, 0o755)  # the database's user must get in
        async with postgres.run(Path(name), durable=False) as server:
            yield Path(name), server


def data_of(server: postgres.Postgres) -> Path:
    return Path(psutil.Process(server.child.process.pid).cwd())


def certify(folder: Path, host: str) -> None:
    """Put a certificate for this host, and its key, where PostgreSQL looks for them."""
    key = folder / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(folder / "server.crt")),
            *("-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"),
        ],
        check=True,
        capture_output=True,
    )
    owner = folder.stat()
    for file in (key, folder / "server.crt"):
        file.chmod(0o600)
        os.chown(file, owner.st_uid, owner.st_gid)


END_SESSIONS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'chiffon'
"""


async def test_a_certificate_that_stops_fitting_condemns_no_heartbeat(
    own_postgres: tuple[Path, postgres.Postgres],
    amqp_url: str,
    queues: Queues,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its error is a ``ValueError`` as well, as is one of a bad row."""
    assert issubclass(ssl.SSLCertVerificationError, ValueError)
    _, server = own_postgres
    data = data_of(server)
    certify(data, "localhost")
    trusted = tmp_path / "trusted.pem"
    shutil.copy(data / "server.crt", trusted)
    await execute(server.url, "ALTER SYSTEM SET ssl = on")
    await execute(server.url, "SELECT pg_reload_conf()")
    parts = urlsplit(server.url)
    netloc = f"{parts.username}:{parts.password}@localhost:{parts.port}"
    url = parts._replace(netloc=netloc, query=f"sslmode=verify-full&sslrootcert={trusted}").geturl()
    await migrations.upgrade(url)
    sent = [update() for _ in range(20)]

    async with orchestrating(amqp_url, url), plain.channel(amqp_url) as to:
        certify(data, "elsewhere.example")
        admin = await asyncpg.connect(asyncpg_url(server.url), ssl=False)
        await admin.execute("SELECT pg_reload_conf()")
        assert await admin.fetchval(END_SESSIONS) > 0
        for one in sent:
            body = one.model_dump_json().encode()
            key = f"heartbeat.default.desktop.{one.agent_id}"
            await plain.publish(to, "chiffon.heartbeats", key, body, "status_update.v1")

        async def is_refused() -> bool:
            assert await admin.fetchval(END_SESSIONS) >= 0
            return "certificate verify failed" in caplog.text

        await until(is_refused, "the certificate is refused")
        await asyncio.sleep(2)  # ingest tries again every two seconds at the latest
        assert "heartbeats wait, trying again" in caplog.text
        certify(data, "localhost")
        shutil.copy(data / "server.crt", trusted)  # renewed on both sides, and nobody restarted
        await admin.execute("SELECT pg_reload_conf()")

        async def are_recorded() -> bool:
            count = await admin.fetchval("SELECT count(*) FROM agent_registry")
            return bool(count == len(sent))

        await until(are_recorded, "all of them are recorded")
        await admin.close()
    assert queues.take("chiffon.dead-letters") == []


@asynccontextmanager
async def standby_of(folder: Path, url: str) -> AsyncIterator[str]:
    """Run a standby of a database; yields its URL."""
    user = unprivileged_user()
    programs, port = postgres.programs(), free_port()
    data = folder / "standby"
    data.mkdir(mode=0o700)
    if user is not None:
        os.chown(data, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    copying = await asyncio.create_subprocess_exec(
        *(str(programs / "pg_basebackup"), "-D", str(data), "-R", "-X", "stream"),
        *("-c", "fast", "-d", asyncpg_url(url)),
        user=user,
        cwd=folder,
    )
    assert await copying.wait() == 0
    server = await asyncio.create_subprocess_exec(
        *(str(programs / "postgres"), "-D", str(data), "-p", str(port)),
        # A standby takes no fewer connections than its primary.
        *("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"),
        *("-c", "unix_socket_directories="),
        user=user,
        cwd=data,
        stderr=asyncio.subprocess.DEVNULL,
        preexec_fn=tie_to(os.getpid(), signal.SIGKILL),
    )
    parts = urlsplit(url)
    netloc = f"{parts.username}:{parts.password}@127.0.0.1:{port}"
    standby = parts._replace(netloc=netloc).geturl()

    async def answers() -> bool:
        assert server.returncode is None, "the standby ended"
        try:
            await execute(standby, "SELECT 1")
        except (OSError, asyncpg.PostgresError):
            return False
        return True

    try:
        await until(answers, "the standby answers")
        yield standby
    finally:
        if server.returncode is None:
            server.send_signal(signal.SIGQUIT)
            await server.wait()


@pytest.mark.skipif(
    not (postgres.programs() / "pg_basebackup").exists(),
    reason="there is no pg_basebackup: apt-get install postgresql-client",
)
async def test_a_standby_that_takes_over_is_written_to_without_a_restart(
    own_postgres: tuple[Path, postgres.Postgres], amqp_url: str
) -> None:
    folder, primary = own_postgres
    await migrations.upgrade(primary.url)
    async with standby_of(folder, primary.url) as standby:
        parts = urlsplit(primary.url)
        ports = f"127.0.0.1:{urlsplit(standby).port},127.0.0.1:{parts.port}"
        both = parts._replace(netloc=f"{parts.username}:{parts.password}@{ports}").geturl()
        before, after = update(), update()
        async with orchestrating(amqp_url, both), Registry.open(both) as registry:

            async def is_recorded(one: StatusUpdate = before) -> bool:
                async with plain.channel(amqp_url) as to:
                    body = one.model_dump_json().encode()
                    key = f"heartbeat.default.desktop.{one.agent_id}"
                    await plain.publish(to, "chiffon.heartbeats", key, body, "status_update.v1")
                connection = await asyncpg.connect(asyncpg_url(standby))
                found = await connection.fetchval(
                    "SELECT count(*) FROM agent_registry WHERE agent_id = $1",
                    one.agent_id,
                )
                await connection.close()
                return bool(found)

            await until(is_recorded, "the first is on the standby too")
            await registry.path.prove_writable()
            primary.child.process.kill()
            connection = await asyncpg.connect(asyncpg_url(standby))
            assert await connection.fetchval("SELECT pg_is_in_recovery()")
            assert await connection.fetchval("SELECT pg_promote()")
            await connection.close()

            await until(lambda: is_recorded(after), "the second is on the new primary")
            await registry.path.prove_writable()
