"""``chiffon up``: broker, database, orchestrator, gateway and this host's agent, together.

It is up when a capacity answer over AMQP holds this host's own fresh heartbeat: every part has
then done its work once. While it runs, its addresses stand in the state folder, where every
other chiffon command finds them.
"""

import asyncio
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.request import ProxyHandler, build_opener

from chiffon.agent import identity
from chiffon.contract.messages import MAX_OFFERS, CapacityOffers, CapacityQuery
from chiffon.embedded import postgres, rabbitmq
from chiffon.embedded.children import Child
from chiffon.errors import AlreadyUp, BadConfiguration, ChiffonError, ChildFailed
from chiffon.planner.client import PlannerClient
from chiffon.process import stopped_by
from chiffon.registry import migrations
from chiffon.registry.registry import Registry
from chiffon.registry.rows import AgentRow
from chiffon.settings import PREFIX, UP_FILE, UP_LOCK, Settings

START_SECONDS = 60.0
STOP_SECONDS = 12.0
LONGEST_RESTART_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A process that ran this long before it ended is restarted at once."""

_GIVE_UP = {77, 78}
"""Exit codes that another try will not change: access refused, bad configuration."""

Progress = Callable[[str], None]

EVERYTHING = CapacityQuery(min_cpu_cores=0, agent_type=None, limit=MAX_OFFERS)


@dataclass(frozen=True)
class Up:
    """The system when it is up: the fleet, the capacity answer, and the addresses."""

    agents: list[AgentRow]
    offers: CapacityOffers
    urls: dict[str, str]


Ready = Callable[[Up], None]
Result = TypeVar("Result")


async def run(settings: Settings, *, progress: Progress, ready: Ready, once: bool) -> None:
    """Bring everything up, call ``ready``, and keep it up until SIGINT or SIGTERM.

    Args:
        settings: A broker or database that the environment names is used as it is.
        progress: Prints in one line what is going on.
        ready: Called once, when the system has shown that it works.
        once: Stop then, instead of waiting for a signal.

    Raises:
        AlreadyUp: One runs already.
        BadConfiguration: RabbitMQ or PostgreSQL is not installed, or a setting cannot work.
        ChildFailed: A part did not start, or broker or database ended; with its last log lines.
    """
    stopped = stopped_by(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    async with AsyncExitStack() as stack:
        serving = asyncio.create_task(_serve(settings, stack, progress, ready, once))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        serving.cancel()
        # What runs is stopped in order as the stack unwinds; another signal does not hurry it.
        progress("stopping")
        with suppress(asyncio.CancelledError):
            await serving


async def _serve(
    settings: Settings, stack: AsyncExitStack, progress: Progress, ready: Ready, once: bool
) -> None:
    folder = settings.state_folder
    stack.enter_context(_alone(folder))
    amqp_url, management_url, database_url, servers = await _servers(settings, stack, progress)
    await migrations.upgrade(database_url)
    listening = stack.enter_context(_listen(settings.http_host, settings.http_port))
    urls = {
        "amqp_url": amqp_url,
        "database_url": database_url,
        "http_url": _http_url(settings.http_host, listening),
    }
    if management_url is not None:
        urls["management_url"] = management_url
    processes = await stack.enter_async_context(_processes(folder, urls, listening))
    stack.enter_context(_address_file(folder, urls))
    progress("waiting for this host's first heartbeat in a capacity answer")
    ready(await _while_running(servers, _proof(folder, urls, processes)))
    if not once:
        await _while_running(servers, _keep(processes, progress))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the state folder's lock: one ``up`` a folder."""
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            folder.chmod(0o755)  # the database's user must get in, whatever the umask
        lock = os.fdopen(os.open(folder / UP_LOCK, os.O_RDWR | os.O_CREAT, 0o600), "w")
    except OSError as error:
        raise BadConfiguration(
            f"the state folder {folder} cannot be used: {error.strerror}; set CHIFFON_STATE_DIR"
        ) from None
    with lock:
        if not _locked(lock):
            raise AlreadyUp(
                f"a `chiffon up` runs already on {folder}; `chiffon fleet list` shows its fleet. "
                "A second one needs its own CHIFFON_STATE_DIR"
            )
        (folder / UP_FILE).unlink(missing_ok=True)  # of one that was killed
        yield


def _locked(lock: IO[str]) -> bool:
    """Take the lock; somebody who only looks whether it is taken holds it for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


async def _servers(
    settings: Settings, stack: AsyncExitStack, progress: Progress
) -> tuple[str, str | None, str, list[Child]]:
    """Start the private servers that the settings do not name."""
    amqp_url = settings.amqp_url.get_secret_value()
    database_url = settings.database_url.get_secret_value()
    management = settings.management_url
    management_url = management.get_secret_value() if management is not None else None
    children: list[Child] = []
    own_broker = "amqp_url" not in settings.model_fields_set
    if own_broker:
        rabbitmq.server_program()  # says what is missing before anything is started
    if "database_url" not in settings.model_fields_set:
        progress("starting PostgreSQL")
        database = await stack.enter_async_context(postgres.run(settings.state_folder))
        database_url = database.url
        children.append(database.child)
    if own_broker:
        progress("starting RabbitMQ")
        broker = await stack.enter_async_context(rabbitmq.run(settings.state_folder))
        amqp_url, management_url = broker.amqp_url, broker.management_url
        children.append(broker.child)
    return amqp_url, management_url, database_url, children


def _listen(host: str, port: int) -> socket.socket:
    """Listen for the gateway: on this port, or on any other if it is taken.

    It is ours and not the gateway's, so nobody else can answer there, and requests wait while the
    gateway is started again.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        try:
            return socket.create_server((host, port), family=family, backlog=1_024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return socket.create_server((host, 0), family=family, backlog=1_024)
    except OSError as error:
        raise BadConfiguration(
            f"{PREFIX}HTTP_HOST, {PREFIX}HTTP_PORT: cannot listen on {host}:{port}:"
            f" {error.strerror}"
        ) from None


@contextmanager
def _address_file(folder: Path, urls: dict[str, str]) -> Iterator[None]:
    """Write our addresses down for other commands, for as long as we run."""
    path = folder / UP_FILE
    lines = [f"{PREFIX}{name.upper()}={url}\n" for name, url in urls.items()]
    rabbitmq.write_secret(path, "".join(lines))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _http_url(host: str, listening: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


class _Process:
    """One of chiffon's own processes, restarted with back-off when it ends."""

    def __init__(
        self, name: str, folder: Path, environment: dict[str, str], files: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._files = files
        self._folder = folder
        self._environment = environment
        self._pause = 0.5
        self.started = 0.0
        self.child: Child

    async def start(self) -> None:
        self.started = time.monotonic()
        self.child = await Child.start(
            self.name,
            [sys.executable, "-m", "chiffon", self.name, "run"],
            log=self._folder / f"{self.name}.log",
            environment=self._environment,
            death_signal=signal.SIGTERM,
            files=self._files,
        )

    async def keep(self, progress: Progress) -> None:
        """Restart it for as long as it ends."""
        while True:
            ended = await self.child.ended()
            if time.monotonic() - self.started > STEADY_SECONDS:
                self._pause = 0.5
            progress(f"{str(ended).splitlines()[0]}; restarting in {self._pause:g} s")
            await asyncio.sleep(self._pause)
            self._pause = min(self._pause * 2, LONGEST_RESTART_PAUSE_SECONDS)
            await self.start()


@asynccontextmanager
async def _processes(
    folder: Path, urls: dict[str, str], listening: socket.socket
) -> AsyncIterator[list[_Process]]:
    environment = {
        **os.environ,
        **{f"{PREFIX}{name.upper()}": url for name, url in urls.items()},
        f"{PREFIX}STATE_DIR": str(folder),
        f"{PREFIX}HTTP_FD": str(listening.fileno()),
    }
    # One port cannot be both the agent's and the orchestrator's.
    environment.pop(f"{PREFIX}METRICS_PORT", None)
    processes: list[_Process] = []
    try:
        for name in ("orchestrator", "gateway", "agent"):
            files = [listening.fileno()] if name == "gateway" else []
            process = _Process(name, folder, environment, files)
            await process.start()
            processes.append(process)
        yield processes
    finally:
        # The agent first, so that its farewell is still recorded.
        for process in reversed(processes):
            await process.child.stop(signal.SIGTERM, STOP_SECONDS)


async def _proof(folder: Path, urls: dict[str, str], processes: list[_Process]) -> Up:
    """Wait for a capacity answer with this host's own fresh heartbeat in it."""
    missing = "anything"
    async with (
        PlannerClient.open(urls["amqp_url"], name="chiffon up") as planner,
        Registry.open(urls["database_url"]) as registry,
    ):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            await _restart_or_give_up(processes)
            try:
                offers = await planner.find(EVERYTHING, timeout=2)
                if not _has_own(offers, folder, time.monotonic() - processes[-1].started):
                    missing = "a capacity answer with this host's heartbeat"
                elif not await asyncio.to_thread(_is_ready, urls["http_url"]):
                    missing = "a gateway that is ready"
                else:
                    agents = await registry.agents.list()
                    return Up(agents=agents, offers=offers, urls=urls)
            except ChiffonError as error:
                missing = f"a capacity answer: {error}"
            await asyncio.sleep(0.1)
    logs = "\n".join(process.child.last_words() for process in processes)
    raise ChildFailed(f"not up within {START_SECONDS:g} s: there was not {missing}\n{logs}")


async def _restart_or_give_up(processes: list[_Process]) -> None:
    for process in processes:
        code = process.child.process.returncode
        if code in _GIVE_UP:
            raise await process.child.ended()
        if code is not None:
            await process.start()


def _has_own(offers: CapacityOffers, folder: Path, running_seconds: float) -> bool:
    own = identity.peek(folder)
    return own is not None and any(
        offer.agent_id == own.agent_id and offer.heartbeat_age_seconds < running_seconds
        for offer in offers.agents
    )


def _is_ready(http_url: str) -> bool:
    try:
        # Not by way of a proxy that the environment names.
        with build_opener(ProxyHandler({})).open(f"{http_url}/readyz", timeout=3) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False


async def _while_running(servers: list[Child], work: Coroutine[Any, Any, Result]) -> Result:
    """Return what ``work`` returns, unless broker or database ends before."""
    working = asyncio.ensure_future(work)
    ending = [asyncio.ensure_future(server.ended()) for server in servers]
    try:
        either: set[asyncio.Future[Any]] = {working, *ending}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        for server in ending:
            if server.done():
                raise server.result()
        return await working
    finally:
        for task in (working, *ending):
            task.cancel()


async def _keep(processes: list[_Process], progress: Progress) -> None:
    """Restart what ends, for as long as we run."""
    await asyncio.gather(*(process.keep(progress) for process in processes))
