"""Celery's receiver of worker heartbeats, with a snapshot of its state into the database.

As its documentation has it for monitors: the state is kept in memory, and a camera writes all of
it from time to time, here every second. ``sequence`` is the heartbeat's logical clock.
"""

import json
import os
import threading
import time
from urllib.parse import urlsplit

import asyncpg
from celery import Celery
from celery.events.receiver import EventReceiver
from celery.events.state import State

from chiffon.embedded.postgres import asyncpg_url

EVERY_SECONDS = 1.0
SNAPSHOT = """
UPDATE agent_registry r SET last_heartbeat_at = now(), sequence = b.sequence,
       resource_metrics = b.metrics::jsonb
  FROM unnest($1::text[], $2::bigint[], $3::text[]) AS b (hostname, sequence, metrics)
 WHERE r.hostname = b.hostname AND r.sequence < b.sequence
"""


def camera(state: State) -> None:
    """Write the state of all workers every second."""
    import asyncio

    async def run() -> None:
        url = asyncpg_url(os.environ["CHIFFON_DATABASE_URL"])
        database = await asyncpg.connect(url)
        while True:
            began = time.monotonic()
            with state._mutex:
                workers = [
                    (name, worker.clock, json.dumps(worker.sw_sys))
                    for name, worker in state.workers.items()
                ]
            if workers:
                workers.sort()
                await database.execute(SNAPSHOT, *map(list, zip(*workers, strict=True)))
            await asyncio.sleep(max(EVERY_SECONDS - (time.monotonic() - began), 0))

    asyncio.run(run())


def main() -> None:
    """Receive worker heartbeats for ever."""
    url = os.environ["CHIFFON_AMQP_URL"]
    app = Celery(broker=url)
    assert urlsplit(url).scheme == "amqp"
    state = State(max_workers_in_memory=1_000_000)
    threading.Thread(target=camera, args=(state,), daemon=True).start()
    with app.connection_for_read() as connection:
        receiver = EventReceiver(
            connection,
            handlers={"*": state.event},
            app=app,
            node_id="benchmark",
            # So that the queue can be filled before: by itself it is exclusive.
            queue_exclusive=False,
            queue_durable=True,
            queue_ttl=60,
            queue_expires=60,
        )
        receiver.capture(limit=None, timeout=None, wakeup=False)


if __name__ == "__main__":
    main()
