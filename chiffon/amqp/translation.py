"""What the AMQP library raises, in chiffon's own exceptions."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import aiormq

from chiffon.errors import (
    BusRefused,
    BusUnavailable,
    NotTaken,
    TopologyMismatch,
    TopologyMissing,
    Unroutable,
    masked,
)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn what the AMQP library raises inside the block into chiffon's exceptions.

    A ``CancelledError`` that nobody asked for is one of them: when a connection dies, aiormq
    raises it from a publish in flight, and a loop that lets it pass would end silently.
    """
    with cancellable(), _translated(doing):
        yield


@contextmanager
def cancellable() -> Iterator[None]:
    """Raise the cancellation that was asked for inside the block, and that the library lost.

    aiormq shrugs off one that comes at the end of dialling: a loop that is cancelled then would
    go on for ever, and who waits for its end would wait as long. One that was asked for before
    has been raised before: what runs now is tidying up.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    except Exception:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from None
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    except asyncio.CancelledError:
        if task is not None and task.cancelling() > before:
            raise
        raise BusUnavailable(f"{doing}: the connection broke") from None
    except TimeoutError:
        raise BusUnavailable(f"{doing}: not confirmed in time") from None
    except (aiormq.exceptions.AMQPError, OSError, RuntimeError) as error:
        ours = _TRANSLATIONS.get(type(error), BusUnavailable)
        raise ours(f"{doing}: {describe(error)}") from None
    except Exception as error:
        # A connection that ends between two frames: the library raises a bare Exception.
        if type(error) is not Exception:
            raise
        raise BusUnavailable(f"{doing}: the connection broke") from None


_TRANSLATIONS: dict[type[BaseException], type[BusUnavailable]] = {
    aiormq.exceptions.ChannelNotFoundEntity: TopologyMissing,
    aiormq.exceptions.ChannelAccessRefused: BusRefused,
    aiormq.exceptions.ChannelPreconditionFailed: TopologyMismatch,
    aiormq.exceptions.PublishError: Unroutable,
    aiormq.exceptions.DeliveryError: NotTaken,
}


def describe(error: BaseException | None) -> str:
    """Return one line for people; library exceptions keep theirs in ``args``."""
    if error is None or isinstance(error, asyncio.CancelledError):
        return "the connection was closed"
    if isinstance(error, aiormq.exceptions.PublishError):
        reason = getattr(error.frame, "reply_text", None) or "NO_ROUTE"
        return f"no queue is bound for it ({reason})"
    if isinstance(error, aiormq.exceptions.DeliveryError):
        return "a queue is full, or its node is down"
    words = [str(arg) for arg in error.args if arg is not None]
    return masked(" ".join(words) or type(error).__name__)
