"""Publishing, acknowledging and rejecting on the broker, each bounded in time."""

import asyncio
import time

from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from chiffon.amqp.connection import CLOSE_SECONDS, Channel, Connection
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.amqp.translation import translated
from chiffon.contract.codec import encode, routing_key
from chiffon.contract.lease import lease_for
from chiffon.contract.messages import STATUS_UPDATE, StatusUpdate
from chiffon.contract.topology import HEARTBEATS
from chiffon.errors import BusUnavailable, NotTaken, Unroutable

Properties = Basic.Properties

HEARTBEAT_CONFIRM_SECONDS = 3.0


class Publisher:
    """Publishes on whatever connection a supervised connection has now, on a channel of its own.

    A connection on which a confirm does not come in time is taken for dead and dropped, unless the
    broker has said that an alarm blocks it: the library would notice only after 18 s.

    Args:
        supervised: The connection.
        confirms: Whether to wait for the broker's confirm.
    """

    def __init__(self, supervised: ReconnectingConnection, *, confirms: bool = True) -> None:
        self._supervised = supervised
        self._confirms = confirms
        self._open: tuple[Connection, Channel] | None = None
        self._opening = asyncio.Lock()

    async def publish(
        self,
        body: bytes,
        *,
        exchange: str,
        routing_key: str,
        properties: Properties,
        timeout: float,
        mandatory: bool = True,
    ) -> None:
        """Do what ``publish`` does; ``timeout`` includes waiting for the connection.

        Raises:
            BusUnavailable: As ``publish``, or no connection came in time.
        """
        connection: Connection | None = None
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                connection = await self._supervised.connection()
                began = time.monotonic()
                await publish(
                    await self._channel(connection),
                    body,
                    exchange=exchange,
                    routing_key=routing_key,
                    properties=properties,
                    timeout=timeout,
                    mandatory=mandatory,
                )
        except (Unroutable, NotTaken):
            raise
        except TimeoutError:
            trouble = f"not published in {timeout:g} s: {self._supervised.trouble}"
            # Who waited for the connection for most of the time knows nothing of it. If such
            # callers gave it up, those of a lost one would take the next one down with them.
            if connection is not None and time.monotonic() - began >= timeout / 2:
                self._suspect(connection, trouble)
            raise BusUnavailable(trouble) from None
        except BusUnavailable as error:
            if connection is not None:
                self._suspect(connection, str(error))
            raise

    def _suspect(self, connection: Connection, trouble: str) -> None:
        if self._confirms and not connection.is_blocked:
            connection.drop(trouble)

    async def _channel(self, connection: Connection) -> Channel:
        async with self._opening:
            if self._open is None or self._open[0] is not connection:
                self._open = (connection, await connection.channel(confirms=self._confirms))
            return self._open[1]


async def publish(
    channel: Channel,
    body: bytes,
    *,
    exchange: str,
    routing_key: str,
    properties: Properties,
    timeout: float,
    mandatory: bool = True,
) -> None:
    """Publish one message, and on a channel with confirms wait for the broker's confirm.

    Args:
        channel: From ``Connection.channel``.
        body: The body, encoded.
        exchange: Its name; empty for the default exchange.
        routing_key: At most 255 bytes.
        properties: AMQP properties. Leave ``message_id`` empty: the library matches returned
            messages by it and fills in a fresh one.
        timeout: Seconds to wait, above zero. After it the message may still arrive.
        mandatory: Whether a message that no queue takes is an error.

    Raises:
        Unroutable: Confirmed, and no queue took it.
        NotTaken: A queue did not take it.
        TopologyMissing: There is no such exchange. The connection is lost.
        BusUnavailable: Not confirmed in time, refused, or the connection broke.
    """
    with translated(f"publishing to {exchange or 'a reply queue'}"):
        await channel.basic_publish(
            body,
            exchange=exchange,
            routing_key=routing_key,
            properties=properties,
            mandatory=mandatory,
            timeout=timeout,
            # Else the library keeps all others from publishing until the socket has drained, one
            # turn of the loop a message; who wants to know waits for the confirm.
            wait=False,  # type: ignore[call-arg]
        )


async def publish_heartbeat(publisher: Publisher, update: StatusUpdate) -> None:
    """Publish one heartbeat and wait for its confirm.

    It expires with the agent's lease, since what waited longer says nothing about the present.
    A farewell does not, and survives a broker's restart.

    Raises:
        Unroutable: No queue takes heartbeats.
        BusUnavailable: Not confirmed within 3 s.
    """
    lease_milliseconds = int(lease_for(update.interval_seconds) * 1_000)
    await publisher.publish(
        encode(update),
        exchange=HEARTBEATS,
        routing_key=routing_key(update),
        properties=Properties(
            message_type=STATUS_UPDATE,
            content_type="application/json",
            delivery_mode=2 if update.is_farewell else 1,
            expiration=None if update.is_farewell else str(lease_milliseconds),
        ),
        timeout=HEARTBEAT_CONFIRM_SECONDS,
    )


async def acknowledge(message: DeliveredMessage) -> None:
    """Acknowledge a delivery.

    Raises:
        BusUnavailable: Its connection is gone: the broker delivers it again.
    """
    with translated("acknowledging"):
        # On a dying connection the library's queue is full and nobody empties it any more.
        async with asyncio.timeout(CLOSE_SECONDS):
            await message.channel.basic_ack(_tag(message))


async def reject(message: DeliveredMessage) -> None:
    """Give a delivery back for good: the broker sets it aside.

    Raises:
        BusUnavailable: Its connection is gone: the broker delivers it again.
    """
    with translated("rejecting"):
        async with asyncio.timeout(CLOSE_SECONDS):
            await message.channel.basic_reject(_tag(message), requeue=False)


def _tag(message: DeliveredMessage) -> int:
    if message.delivery_tag is None:
        raise ValueError("not a delivery of a consumer")
    return message.delivery_tag
