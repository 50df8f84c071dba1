"""How long a planner waits for an answer, by the size of the fleet.

    python -m benchmarks.capacity --agents 1000 10000 100000 1000000

A private RabbitMQ and PostgreSQL and one orchestrator. Each question is asked by one caller and by
32 at once, alone and while 2,000 heartbeats a second come, and once more with three quarters of
the fleet silent. Beside it, in the same run and with the same client: a process that answers with
the same bytes and does nothing else, the HTTP gateway, and a FastStream RPC over the same query.
All are asked in turn, round after round, so that what disturbs a moment does not fall on one alone.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import asyncpg
import httpx

from benchmarks.filled import SILENCE, Speakers, fill
from benchmarks.stage import Stage, percentiles, process, publish, staged, where
from chiffon import PlannerClient
from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import ensure
from chiffon.contract.codec import encode
from chiffon.contract.messages import (
    CapacityOffers,
    CapacityQuery,
    CapacityReserve,
    ReservationRelease,
)
from chiffon.embedded.children import free_port
from chiffon.errors import CapacityError, CapacityRefused
from chiffon.registry.offers import IN_ORDER, wanted
from chiffon.registry.pool import Pool
from chiffon.registry.statements import STATEMENTS
from tests.fixtures.servers import Management
from tests.fixtures.waiting import until

QUESTIONS = {
    "no filter": CapacityQuery(limit=10),
    "VRAM >= 40": CapacityQuery(min_gpu_vram_gb=40, limit=10),
    "one pool of 50": CapacityQuery(pool_name="small", limit=10),
    "cores that few have": CapacityQuery(min_cpu_cores=64, limit=10),
}
WALK = CapacityQuery(min_memory_gb=900, limit=10)
"""What nobody has: all of the index is read. Asked by one caller."""
ALONE, MANY = 1, 32
STATES = ("alone", "loaded", "silent")
HEARTBEATS = 2_000

ECHO = "echo"
ROUNDS = 4

Answer = TypeVar("Answer")


class Clock:
    """Notes how long answers took, in seconds, by what was asked."""

    def __init__(self) -> None:
        self.took: defaultdict[str, list[float]] = defaultdict(list)
        self.offers: dict[str, int] = {}

    async def time(self, label: str, answer: Awaitable[Answer]) -> Answer:
        """Wait for an answer, and return it."""
        began = time.monotonic()
        answered = await answer
        self.took[label].append(time.monotonic() - began)
        if isinstance(answered, CapacityOffers):
            self.offers[label] = len(answered.agents)
        return answered


Ask = Callable[[Clock], Awaitable[object]]


async def timed(ask: Ask, clock: Clock, callers: int, seconds: float) -> None:
    """Let so many callers ask for a while."""

    async def one() -> None:
        while True:
            await ask(clock)
            if time.monotonic() > stop:
                return

    stop = time.monotonic() + seconds
    await asyncio.gather(*(one() for _ in range(callers)))


def report(state: str, callers: int, clock: Clock) -> None:
    """Print how long each answer took, beside the echo."""
    echo50, echo99, _ = percentiles(clock.took[ECHO])
    for label, took in clock.took.items():
        p50, p99, p999 = percentiles(took)
        print(
            f"  {state:<8}{label:<27}{callers:>4}{p50 * 1e3:>9.2f}{p99 * 1e3:>9.2f}"
            f"{p999 * 1e3:>9.2f} ms{p99 / p50:>7.1f}{p50 / echo50:>8.2f} x{p99 / echo99:>7.2f} x"
            f"{clock.offers.get(label, ''):>8}",
            flush=True,
        )


@asynccontextmanager
async def answering(
    stage: Stage, stack: AsyncExitStack, *, with_gateway: bool
) -> AsyncIterator[list[Ask]]:
    """Start everybody who answers; provide how each is asked, and last what one caller asks."""
    folder = Path(stage.folder)
    stack.enter_context(process((sys.executable, "-m", "chiffon", "orchestrator", "run"), stage))
    planner = await stack.enter_async_context(PlannerClient.open(stage.amqp_url))
    question = QUESTIONS["no filter"]
    sample = await first_answer(planner, question)
    (folder / "answer.json").write_bytes(encode(sample))
    aside = await _aside(stage)
    stack.enter_context(
        process(
            (sys.executable, "-m", "benchmarks.contenders.echo_responder"),
            aside,
            ANSWER=str(folder / "answer.json"),
        )
    )
    echo = await stack.enter_async_context(PlannerClient.open(aside.amqp_url))
    await first_answer(echo, question)
    agent_id = sample.agents[0].agent_id
    asks: list[Ask] = [
        lambda clock: clock.time(ECHO, echo.find(question, timeout=30)),
        *(_find(planner, label, query) for label, query in QUESTIONS.items()),
        lambda clock: clock.time("show", planner.show(agent_id, timeout=30)),
        lambda clock: reserve(planner, clock),
    ]
    if with_gateway:
        http = await _gateway(stage, stack)
        asks.append(lambda clock: clock.time("HTTP, no filter", _get(http, question)))
    faststream = await _faststream(stage, stack, question)
    if faststream is not None:
        asks.append(lambda clock: clock.time("FastStream RPC, no filter", faststream()))
    yield [*asks, _find(planner, "memory that nobody has", WALK)]


async def _gateway(stage: Stage, stack: AsyncExitStack) -> httpx.AsyncClient:
    port = free_port()
    stack.enter_context(
        process(
            (sys.executable, "-m", "chiffon", "gateway", "run"), stage, CHIFFON_HTTP_PORT=str(port)
        )
    )
    http = await stack.enter_async_context(
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=60,
            # Less than the gateway keeps an idle connection: it would close it under us.
            limits=httpx.Limits(keepalive_expiry=2.0),
        )
    )
    await until(partial(_is_there, http), "the gateway", 60)
    return http


def _find(planner: PlannerClient, label: str, query: CapacityQuery) -> Ask:
    return lambda clock: clock.time(f"find, {label}", planner.find(query, timeout=30))


async def first_answer(planner: PlannerClient, query: CapacityQuery) -> CapacityOffers:
    """Return the first answer, waiting for whoever gives it to start."""

    async def answer() -> CapacityOffers | None:
        try:
            return await planner.find(query, timeout=2)
        except CapacityError:
            return None

    found = await until(answer, "a first answer", 60)
    assert found is not None
    return found


async def reserve(planner: PlannerClient, clock: Clock) -> None:
    """Take room and give it back."""
    try:
        made = await clock.time("reserve", planner.reserve_once(_wanted(), timeout=30))
    except CapacityRefused as error:
        raise AssertionError(f"there is room: {error}") from None
    over = ReservationRelease(reservation_id=made.reservation_id)
    await clock.time("release", planner.release(over, timeout=30))


def _wanted() -> CapacityReserve:
    return CapacityReserve(
        holder="benchmark", idempotency_key=uuid4(), gpu_vram_gb=20.0, cpu_cores=1, memory_gb=1.0
    )


async def _is_there(http: httpx.AsyncClient) -> bool:
    try:
        await http.get("/livez")
    except httpx.TransportError:
        return False
    return True


async def _get(http: httpx.AsyncClient, query: CapacityQuery) -> None:
    answer = await http.get("/api/v1/agents/available-capacity", params={"limit": query.limit})
    answer.raise_for_status()


async def _aside(stage: Stage) -> Stage:
    """Return the same broker with a virtual host of its own, for the echo."""
    management = Management(stage.management_url)
    management.call("PUT", "vhosts/echo", {})
    user = stage.amqp_url.split("//")[1].split(":")[0]
    rights = {"configure": ".*", "write": ".*", "read": ".*"}
    management.call("PUT", f"permissions/echo/{user}", rights)
    aside = replace(stage, amqp_url=stage.amqp_url.rpartition("/")[0] + "/echo")
    await ensure(lambda: dial_any(aside.amqp_url, "benchmark declares"))
    return aside


async def _faststream(
    stage: Stage, stack: AsyncExitStack, query: CapacityQuery
) -> Callable[[], Awaitable[object]] | None:
    try:
        from faststream.rabbit import RabbitBroker
    except ImportError:
        print("FastStream is not installed: left out", file=sys.stderr)
        return None
    stack.enter_context(
        process((sys.executable, "-m", "benchmarks.contenders.faststream_rpc"), stage)
    )
    broker = await stack.enter_async_context(RabbitBroker(stage.amqp_url, logger=None))

    async def ask() -> object:
        return await broker.request(encode(query), "benchmark.capacity", timeout=30)

    async def answer() -> object:
        try:
            return await broker.request(encode(query), "benchmark.capacity", timeout=2)
        except Exception:
            return None

    await until(answer, "FastStream's first answer", 60)
    return ask


async def measure(
    stage: Stage,
    agents: int,
    seconds: float,
    callers: Sequence[int],
    states: Sequence[str],
    *,
    plans: bool = False,
    with_gateway: bool = True,
) -> None:
    """Fill the registry, and ask everybody."""
    print(
        f"{agents:,} agents".ljust(34)
        + "callers     p50      p99    p99.9     p99/p50   beside echo: p50, p99  offers"
    )
    async with stage.database() as database:
        await fill(database, agents)
        if plans:
            await _print_plans(stage.database_url)
        async with (
            AsyncExitStack() as stack,
            answering(stage, stack, with_gateway=with_gateway) as asks,
        ):
            for state in states:
                async with _state(stage, database, state):
                    for count in callers:
                        asked_now = asks[: None if count == 1 else -1]
                        for ask in asked_now:
                            await timed(ask, Clock(), count, 0.1)  # connections and plans
                        clock = Clock()
                        for _ in range(ROUNDS):
                            for ask in asked_now:
                                await timed(ask, clock, count, seconds / ROUNDS)
                        report(state, count, clock)


@asynccontextmanager
async def _state(
    stage: Stage, database: "asyncpg.Connection[asyncpg.Record]", state: str
) -> AsyncIterator[None]:
    if state == "silent":
        await database.execute(SILENCE)
        await database.execute("VACUUM ANALYZE agent_registry")
    if state != "loaded":
        yield
        return
    rows = await database.fetch(
        "SELECT agent_id, pool_name, resource_metrics ->> 'cpu_cores_available' = '100'"
        "  FROM agent_registry LIMIT 10000"
    )
    listed = Path(stage.folder) / "speakers"
    listed.write_text(json.dumps([(str(one[0]), one[1], one[2]) for one in rows]))
    argv = (sys.executable, "-m", "benchmarks.capacity", "--publish", str(listed))
    with process(argv, stage):
        await asyncio.sleep(3)
        yield
    await until(partial(_is_drained, stage), "what is left of the load is recorded", 120)


async def _is_drained(stage: Stage) -> bool:
    return await stage.depth() == 0


async def _print_plans(url: str) -> None:
    """Print the plans that the orchestrator's statements have, which are made once for all."""
    request = _wanted()
    others = {
        "holder": request.holder,
        "idempotency_key": request.idempotency_key,
        "most": 1,
        "without": "{}",
        "skipped": 0,
    }
    asked = {
        f"find, {label}": (
            "find" if query.pool_name is None else "find_in_pool",
            {**wanted(query), **others, "most": query.limit + 1},
        )
        for label, query in QUESTIONS.items()
    }
    asked["reserve"] = "lock_candidates", {**wanted(request.needs()), **others}
    async with Pool.open(url, 1, IN_ORDER) as ready, ready.one() as connection:
        for label, (name, given) in asked.items():
            statement = STATEMENTS[name].text
            arguments = [given[one] for one in STATEMENTS[name].parameters]
            print(f"  plan of {label}:")
            values = ", ".join("NULL" if one is None else f"'{one}'" for one in arguments)
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(f"PREPARE shown AS {statement}")
            rows = await connection.fetch(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS) EXECUTE shown ({values})"
            )
            await connection.execute("DEALLOCATE shown")
            await transaction.rollback()
            for row in rows:
                print(f"    {row[0][:150]}")


async def run(given: argparse.Namespace) -> None:
    """Measure each size of fleet on fresh servers."""
    for agents in given.agents:
        async with staged() as stage:
            print(where(stage), flush=True)
            await measure(
                stage,
                agents,
                given.seconds,
                given.callers,
                given.states,
                plans=given.plans,
                with_gateway=not given.no_gateway,
            )


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--agents", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--callers", type=int, nargs="*", default=[ALONE, MANY])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each cell of the table")
    parser.add_argument("--states", nargs="*", default=STATES, choices=STATES)
    parser.add_argument("--plans", action="store_true", help="print the query plans as well")
    parser.add_argument(
        "--no-gateway", action="store_true", help="which looks at all agents all the time"
    )
    parser.add_argument("--publish", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--heartbeats", type=float, default=HEARTBEATS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.publish:
        fleet = Speakers(json.loads(given.publish.read_text()))
        url = os.environ["CHIFFON_AMQP_URL"]
        asyncio.run(publish(url, fleet.heartbeats(), sys.maxsize, per_second=given.heartbeats))
        return
    asyncio.run(run(given))


if __name__ == "__main__":
    main()
