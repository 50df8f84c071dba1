"""A cluster of three RabbitMQ nodes on the loopback address, and a system on it."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from chiffon.embedded import postgres, rabbitmq
from chiffon.embedded.children import Child, free_port
from tests.faults.lab import Lab, inhabited
from tests.faults.server import Server
from tests.fixtures.proxy import Proxy
from tests.fixtures.waiting import until

NODES = 3


class Node:
    """One node, which shares the secret and the name server of the others.

    Args:
        folder: For its data.
        secrets: Cookie and password, the same for all nodes.
        epmd_port: Of the name server that all nodes share.
    """

    def __init__(self, folder: Path, secrets: Mapping[str, str], epmd_port: str) -> None:
        folder.mkdir(mode=0o700)
        for name, content in secrets.items():
            rabbitmq.write_secret(folder / name, content)
        self.folder = folder
        self.port = free_port()
        self.program = rabbitmq.server_program()
        self.environment = {
            **rabbitmq._environment(folder, self.port),
            "ERL_EPMD_PORT": epmd_port,
        }
        rabbitmq._write_configuration(
            folder, self.port, free_port(), secrets["password"], rabbitmq.PLUGINS, {}
        )
        self.url = f"amqp://{rabbitmq.USER}:{secrets['password']}@127.0.0.1:{self.port}"

    async def start(self) -> Child:
        child = await Child.start(
            "RabbitMQ",
            [str(self.program)],
            log=self.folder / "console.log",
            environment=self.environment,
            death_signal=signal.SIGKILL,
            folder=self.folder,
        )
        await rabbitmq._answers(child, f"{self.url}/{rabbitmq.VHOST}")
        return child

    def ctl(self, *arguments: str, seconds: float = 60) -> str:
        """Manage it with ``rabbitmqctl``, for so long at most; returns what that printed."""
        done = subprocess.run(
            [str(self.program.with_name("rabbitmqctl")), "-q", *arguments],
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        return done.stdout

    def join(self, first: "Node") -> None:
        """Become a part of the first node's cluster."""
        self.ctl("stop_app")
        self.ctl("join_cluster", first.name)
        self.ctl("start_app")

    @property
    def name(self) -> str:
        return self.environment["RABBITMQ_NODENAME"]


class ClusterLab(Lab):
    """A system on three nodes."""

    nodes: list[Node]

    async def holder(self, queue: str) -> Server:
        """Return the node that holds a queue, or leads it."""

        async def found() -> Server | None:
            return (await self._holders() or {}).get(queue)

        server = await until(found, f"the node of {queue}", 90)
        assert server is not None
        return server

    async def lacks_queue(self, queue: str) -> bool:
        """Whether a node says that there is no such queue."""
        holders = await self._holders()
        return holders is not None and queue not in holders

    async def _holders(self) -> dict[str, Server] | None:
        """Return the node of every queue, as the first node says that answers."""
        for node, broker in zip(self.nodes, self.brokers, strict=True):
            if not broker.is_running or broker.is_frozen:
                continue
            arguments = ("list_queues", "-p", rabbitmq.VHOST, "name", "pid", "leader")
            try:
                listed = await asyncio.to_thread(node.ctl, *arguments, seconds=10)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                continue  # it, or one that it asks, has only just been started
            return {
                line.split()[0]: server
                for line in listed.splitlines()
                for one, server in zip(self.nodes, self.brokers, strict=True)
                if one.name in line
            }
        return None


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[ClusterLab]:
    """Start a system on three nodes; its agents know all of them."""
    async with servers(folder) as lab, inhabited(lab, lab.amqp_url) as made:
        yield made


@asynccontextmanager
async def servers(folder: Path) -> AsyncIterator[ClusterLab]:
    """Start three nodes and a database, and nobody on them."""
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(postgres.run(folder))
        secrets = {".erlang.cookie": "three-nodes", "password": "three-nodes"}
        epmd_port = str(free_port())
        nodes = [Node(folder / f"node-{n}", secrets, epmd_port) for n in range(NODES)]
        epmd = await Child.start(
            "epmd",
            [rabbitmq._epmd_program(), "-address", "127.0.0.1", "-port", epmd_port],
            log=folder / "epmd.log",
            environment=nodes[0].environment,
            death_signal=signal.SIGKILL,
        )
        stack.push_async_callback(epmd.stop, signal.SIGTERM, 2)
        brokers = []
        for node in nodes:
            child = await node.start()
            stack.push_async_callback(child.stop, signal.SIGKILL, 5)
            brokers.append(
                Server(child.process.pid, [str(node.program)], node.environment, node.folder)
            )
            stack.callback(brokers[-1].end)
        for node in nodes[1:]:
            await asyncio.to_thread(node.join, nodes[0])
        where = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        url = f"{nodes[0].url.rpartition('@')[0]}@{where}/{rabbitmq.VHOST}"
        database = Server.of(base.child.process.pid)
        lab = ClusterLab(url, base.url, brokers, database, Proxy("", 0), folder)
        lab.nodes = nodes
        yield lab
