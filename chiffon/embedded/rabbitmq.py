"""A private RabbitMQ: its own ports, data and password, on the loopback address only.

The system's service and port 5672 are left alone. Source of the variables: rabbitmq.com,
"Configuration" and the scripts ``rabbitmq-env`` and ``rabbitmq-server``; tried on 3.10 and 4.0.
"""

import asyncio
import os
import re
import secrets
import shutil
import signal
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from chiffon.amqp.connection import dial
from chiffon.embedded.children import Child, free_port
from chiffon.errors import BadConfiguration, BusRefused, BusUnavailable

START_SECONDS = 90.0
STOP_SECONDS = 20.0
FIRST_RUN = "first-run"
"""Stands in the folder until the broker that made the data has ended in order."""

PLUGINS = (
    "rabbitmq_consistent_hash_exchange",
    "rabbitmq_event_exchange",
    "rabbitmq_management",
)
VHOST = "chiffon"
USER = "chiffon"

_SERVERS = (
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server",
    "/opt/rabbitmq*/sbin/rabbitmq-server",
    "/usr/local/lib/rabbitmq*/sbin/rabbitmq-server",
)

# Exec the virtual machine instead of keeping a shell as its parent, so that it is our child;
# no busy-waiting schedulers on somebody's desktop; no distribution beyond the loopback address.
_ERLANG_FLAGS = (
    "-noinput +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
)


@dataclass(frozen=True)
class RabbitMQ:
    """A running private broker.

    ``rabbitmqctl`` beside ``program``, run with ``environment``, manages it.
    """

    amqp_url: str
    management_url: str
    child: Child
    program: Path
    environment: dict[str, str]


def server_program() -> Path:
    """Return the server's own start script, not the distribution's wrapper, which wants root.

    Raises:
        BadConfiguration: RabbitMQ is not installed; the message says how to.
    """
    for pattern in _SERVERS:
        found = sorted(Path("/").glob(pattern.removeprefix("/")), key=_version)
        if found:
            return found[-1]
    on_path = shutil.which("rabbitmq-server")
    if on_path and Path(on_path).resolve().parent.name == "sbin" and "/usr/sbin" not in on_path:
        return Path(on_path).resolve()
    raise BadConfiguration(
        "RabbitMQ is not installed on this machine. Install it (Debian, Ubuntu: "
        "`sudo apt-get install --no-install-recommends rabbitmq-server`), "
        "or set CHIFFON_AMQP_URL to a broker that runs elsewhere"
    )


def _version(path: Path) -> tuple[int, ...]:
    match = re.search(r"rabbitmq_server-([\d.]+)", str(path))
    return tuple(int(part) for part in match[1].split(".") if part) if match else ()


@asynccontextmanager
async def run(
    state: Path,
    *,
    stop_gently: bool = True,
    plugins: Sequence[str] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[RabbitMQ]:
    """Run a broker for as long as the context is open; its data stays in ``state``.

    Args:
        state: The state folder. Data is kept per version, which another may not read.
        stop_gently: Whether to let it shut down in order (about 6 s).
        plugins: More of them to enable.
        settings: More lines of ``rabbitmq.conf``, by name.

    Raises:
        BadConfiguration: RabbitMQ is not installed.
        ChildFailed: It does not start.
    """
    program = server_program()
    version = ".".join(str(part) for part in _version(program)[:2]) or "any"
    folder = state / f"rabbitmq-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    _begin_anew_after_a_broken_first_run(folder)
    password = kept_secret(folder / "password")
    amqp_port, management_port = free_port(), free_port()
    environment = _environment(folder, amqp_port)
    _write_configuration(
        folder, amqp_port, management_port, password, (*PLUGINS, *plugins), settings
    )
    log = folder / "console.log"
    # epmd, Erlang's name server, would otherwise be left behind as a daemon.
    epmd = await Child.start(
        "epmd",
        [_epmd_program(), "-address", "127.0.0.1", "-port", environment["ERL_EPMD_PORT"]],
        log=log,
        environment=environment,
        death_signal=signal.SIGKILL,
    )
    broker: Child | None = None
    try:
        broker = await Child.start(
            "RabbitMQ",
            [str(program)],
            log=log,
            environment=environment,
            death_signal=signal.SIGKILL,
            folder=folder,
        )
        amqp_url = f"amqp://{USER}:{password}@127.0.0.1:{amqp_port}/{VHOST}"
        await _answers(broker, amqp_url)
        management_url = f"http://{USER}:{password}@127.0.0.1:{management_port}"
        yield RabbitMQ(amqp_url, management_url, broker, program, environment)
    finally:
        if broker is not None:
            how = signal.SIGTERM if stop_gently else signal.SIGKILL
            if await broker.stop(how, STOP_SECONDS) == 0:
                (folder / FIRST_RUN).unlink(missing_ok=True)
        await epmd.stop(signal.SIGTERM, 2)


def _begin_anew_after_a_broken_first_run(folder: Path) -> None:
    """Remove data whose first broker did not end in order.

    RabbitMQ 3.10 writes down minutes late which quorum queues there are. Killed before, it comes
    back with queues that take no message, for ever. What was in them is minutes old at most.
    """
    data, mark = folder / "data", folder / FIRST_RUN
    if mark.exists():
        shutil.rmtree(data, ignore_errors=True)
    if not data.exists():
        mark.touch()


def kept_secret(path: Path) -> str:
    """Return the secret kept in a file of mode 0600, made at the first call."""
    if not path.exists():
        write_secret(path, secrets.token_hex(16))
    return path.read_text().strip()


def write_secret(path: Path, content: str) -> None:
    """Write a file of mode 0600, as a whole or not at all."""
    making = path.with_name(f"{path.name}.new")
    making.unlink(missing_ok=True)
    with os.fdopen(os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    making.rename(path)


def _environment(folder: Path, amqp_port: int) -> dict[str, str]:
    kept_secret(folder / ".erlang.cookie")
    (folder / ".erlang.cookie").chmod(0o400)
    name = f"chiffon-{zlib.crc32(str(folder.resolve()).encode()):08x}@localhost"
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(free_port()),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_ALLOW_INPUT": "1",
        # Nothing of the system's own broker: neither its settings nor its port.
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_CONFIG_FILES": str(folder / "conf.d" / "*.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(amqp_port),
        "RABBITMQ_NODENAME": name,
        "RABBITMQ_PID_FILE": str(folder / "rabbitmq.pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _ERLANG_FLAGS,
    }


def _write_configuration(
    folder: Path,
    amqp_port: int,
    management_port: int,
    password: str,
    plugins: Sequence[str],
    more: Mapping[str, str],
) -> None:
    settings = {
        "listeners.tcp.local": f"127.0.0.1:{amqp_port}",
        "management.tcp.ip": "127.0.0.1",
        "management.tcp.port": str(management_port),
        "default_vhost": VHOST,
        "default_user": USER,
        "default_pass": password,
        "default_user_tags.administrator": "true",
        "log.file.level": "warning",
        # The management UI shows a new connection within 1 s instead of 5.
        "collect_statistics_interval": "1000",
        **more,
    }
    configuration = folder / "rabbitmq.conf"
    configuration.touch(mode=0o600)
    configuration.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")


def _epmd_program() -> str:
    on_path = shutil.which("epmd")
    if on_path:
        return on_path
    found = sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
    if not found:
        raise BadConfiguration("RabbitMQ is here, but not Erlang's epmd: reinstall the package")
    return str(found[-1])


async def _answers(broker: Child, url: str) -> None:
    """Wait for an AMQP handshake: an open port says nothing yet."""
    refused_until = asyncio.get_running_loop().time() + 5
    try:
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    await (await dial(url, "is it up?")).close()
                    return
                except BusRefused:
                    # For a moment at the first start the user is not there yet.
                    if asyncio.get_running_loop().time() > refused_until + 5:
                        raise
                except BusUnavailable:
                    pass
                if not broker.is_running:
                    raise await broker.ended()
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise BusUnavailable(
            f"RabbitMQ did not answer within {START_SECONDS:g} s\n{broker.last_words()}"
        ) from None
