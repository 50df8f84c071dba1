"""Bodies to messages and back, and the JSON Schema of the contract.

A body that does not fit is refused with one line that names the field, never with its content.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from chiffon.contract import messages
from chiffon.contract.fields import shortened
from chiffon.contract.messages import BODIES, StatusUpdate
from chiffon.errors import BadMessage

KIB = 1024
MAX_MESSAGE_BYTES = 64 * KIB
MAX_REPLY_BYTES = 1024 * KIB
_ID_LENGTH = 36

Body = TypeVar("Body", bound=BaseModel)


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


def decode_heartbeat(body: bytes, key: str) -> StatusUpdate:
    """Read one heartbeat.

    Args:
        body: The body as it came.
        key: The routing key that it came with; ``heartbeat.<pool>.<agent_type>.<agent_id>`` must
            agree with the body.

    Returns:
        The heartbeat, every field checked.

    Raises:
        BadMessage: It does not fit, or belongs to another routing key; the reason says which.
    """
    update = _valid_heartbeat(body, key)
    if update is not None:
        return update
    # Read once more, in steps that each have a name, to say what is wrong.
    update = _validate(StatusUpdate, _parse(body, MAX_MESSAGE_BYTES))
    if key.lower() != routing_key(update).lower():
        raise BadMessage(
            f"routing key {shortened(key)} does not agree with the body, which belongs to "
            f"{routing_key(update)}"
        )
    return update


def _valid_heartbeat(body: bytes, key: str) -> StatusUpdate | None:
    """Read a heartbeat in one step, straight from its JSON; ``None`` if there is anything to say.

    Validating the JSON itself takes half the time of parsing it first.
    """
    # Where no field takes them, this reader would accept numbers that JSON does not have.
    if len(body) > MAX_MESSAGE_BYTES or b"NaN" in body or b"Infinity" in body:
        return None
    try:
        update = StatusUpdate.__pydantic_validator__.validate_json(body)
    except ValidationError:
        return None
    # As in `routing_key`; formatting the id would cost as much as all the rest of this.
    is_its_own = (
        key[:-_ID_LENGTH] == f"heartbeat.{update.pool_name}.{update.agent_type}."
        and key[-_ID_LENGTH:].replace("-", "") == f"{update.agent_id.int:032x}"
        and key[-28] == key[-23] == key[-18] == key[-13] == "-"
    )
    return update if is_its_own else None


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
    where = ".".join(shortened(str(part)) for part in problems[0]["loc"])
    what = problems[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _too_large(size: int, limit: int) -> str:
    return f"{size} bytes; at most {limit}"
