"""Bodies to messages and back, and the JSON Schema of the contract.

A body that does not fit is refused with one line that names the field, never with its content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, FailFast, TypeAdapter, ValidationError
from pydantic_core import from_json

from chiffon import messages
from chiffon.errors import BadMessage
from chiffon.messages import BODIES, StatusUpdate

KIB = 1024
MAX_MESSAGE_BYTES = 64 * KIB
MAX_ARRAY_BYTES = 1024 * KIB
MAX_ARRAY_HEARTBEATS = 1_000
MAX_REPLY_BYTES = 1024 * KIB
_ID_LENGTH = 36

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A heartbeat that was refused: its own JSON, and why."""

    body: bytes
    reason: str


def encode(message: BaseModel) -> bytes:
    """Return the body to send: JSON in UTF-8, times as ISO 8601."""
    return message.model_dump_json().encode()


def decode(kind: type[Body], body: bytes, limit: int = MAX_MESSAGE_BYTES) -> Body:
    """Read one message that is not a heartbeat.

    Args:
        kind: The message that the AMQP ``type`` names.
        body: The body as it came.
        limit: The largest body to look at, in bytes.

    Returns:
        The message, every field checked.

    Raises:
        BadMessage: It does not fit; the reason names the field.
    """
    return _validate(kind, _parse(body, limit))


def decode_heartbeats(
    body: bytes, routing_key: str
) -> tuple[list[StatusUpdate], Sequence[Refusal]]:
    """Read a heartbeat, or a relay's array of them.

    Args:
        body: The body as it came.
        routing_key: The key it came with. ``heartbeat.<pool>.<agent_type>.<agent_id>`` must
            agree with the body; a relay's ``heartbeat.<pool>.relay.<relay_id>`` binds nothing.

    Returns:
        The heartbeats that fit, and a refusal for each element of an array that does not: a bad
        element costs only itself. A single heartbeat that fits has no refusals.

    Raises:
        BadMessage: Nothing of the body can be used.
    """
    plain = _plain_heartbeats(body, routing_key)
    if plain is not None:
        return plain, ()
    content = _parse(body, MAX_ARRAY_BYTES)
    if not isinstance(content, list):
        if len(body) > MAX_MESSAGE_BYTES:
            raise BadMessage(_too_large(len(body), MAX_MESSAGE_BYTES))
        return [_heartbeat(content, routing_key)], ()
    if len(content) > MAX_ARRAY_HEARTBEATS:
        raise BadMessage(f"{len(content)} heartbeats in one array; at most {MAX_ARRAY_HEARTBEATS}")
    good: list[StatusUpdate] = []
    bad: list[Refusal] = []
    for position, element in enumerate(content):
        try:
            good.append(_heartbeat(element, routing_key))
        except BadMessage as error:
            reason = f"element {position} of {len(content)}: {error}"
            bad.append(Refusal(_reencode(element), reason))
    return good, bad


def _plain_heartbeats(body: bytes, key: str) -> list[StatusUpdate] | None:
    """Read what there is nothing to say about in one go, straight from its JSON; else ``None``.

    Whoever finds out what it is reads it once more, in steps that each have a name.
    """
    is_array = body[:1] == b"["
    if len(body) > (MAX_ARRAY_BYTES if is_array else MAX_MESSAGE_BYTES):
        return None
    # Where no field takes them, this reader would let numbers pass that JSON does not have.
    if b"NaN" in body or b"Infinity" in body:
        return None
    try:
        if is_array:
            updates = _ARRAY.validate_json(body)
            is_fit = len(updates) <= MAX_ARRAY_HEARTBEATS and _is_relays(key)
            return updates if is_fit else None
        update = StatusUpdate.__pydantic_validator__.validate_json(body)
    except ValidationError:
        return None
    # As in `routing_key`; writing an id in its groups would cost as much as all the rest of this.
    is_its_own = (
        key[:-_ID_LENGTH] == f"heartbeat.{update.pool_name}.{update.agent_type}."
        and key[-_ID_LENGTH:].replace("-", "") == f"{update.agent_id.int:032x}"
        and key[-28] == key[-23] == key[-18] == key[-13] == "-"
    )
    return [update] if is_its_own else None


# Of what does not fit no more is looked at here: it is read once more, element by element.
_ARRAY = TypeAdapter(Annotated[list[StatusUpdate], FailFast()])


def routing_key(update: StatusUpdate) -> str:
    """Return the routing key that belongs to this heartbeat."""
    return f"heartbeat.{update.pool_name}.{update.agent_type}.{update.agent_id}"


def json_schema() -> dict[str, Any]:
    """Return one JSON Schema (2020-12) document with every message under ``$defs``.

    ``x-amqp-types`` maps each AMQP ``type`` to its definition.
    """
    from pydantic.json_schema import models_json_schema

    _, schema = models_json_schema(
        [(model, "validation") for model in BODIES.values()],
        title="chiffon wire contract, version 1",
        description=(messages.__doc__ or "").strip(),
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "x-amqp-types": {
            name: {"$ref": f"#/$defs/{model.__name__}"} for name, model in BODIES.items()
        },
    }


def _heartbeat(content: Any, key: str) -> StatusUpdate:
    update = _validate(StatusUpdate, content)
    if not _is_relays(key) and key.lower() != routing_key(update).lower():
        raise BadMessage(
            f"routing key {_short(key)} does not agree with the body, which belongs to "
            f"{routing_key(update)}"
        )
    return update


def _is_relays(key: str) -> bool:
    words = key.split(".")
    return len(words) == 4 and words[2] == "relay"


def _parse(body: bytes, limit: int) -> Any:
    if len(body) > limit:
        raise BadMessage(_too_large(len(body), limit))
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadMessage(f"not JSON: {error}" if body else "not JSON: the body is empty") from None


def _validate(kind: type[Body], content: Any) -> Body:
    if not isinstance(content, dict):
        raise BadMessage(f"expected a JSON object, got {type(content).__name__}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadMessage(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """Return one line for people: the first field that does not fit, and why.

    The value itself is left out: it may be long, or a secret, or made to confuse a terminal.
    """
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(_short(str(part)) for part in problems[0]["loc"])
    what = problems[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _too_large(size: int, limit: int) -> str:
    return f"{size} bytes; at most {limit}"


def _short(text: str) -> str:
    """Return at most 64 characters of ``text`` with everything unprintable escaped."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= 64 else f"{escaped[:61]}..."


def _reencode(element: Any) -> bytes:
    from pydantic_core import to_json

    return to_json(element, inf_nan_mode="constants")
