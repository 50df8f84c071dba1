"""The types of the contract's fields, and what every message has in common."""

import difflib
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import core_schema

from chiffon.errors import CODES

MAX_INTEGER = 2**53 - 1
"""The largest whole number that every JSON reader keeps exact."""

MAX_GB = 2.0**40
MAX_COUNT = 1_000_000

AgentType = Literal["orchestrator", "infra", "desktop", "code", "research"]
AgentStatus = Literal["online", "busy", "offline"]


def _only_known(value: str) -> str:
    if value not in CODES:
        raise ValueError("must be one of the contract's codes")
    return value


ErrorCode = Annotated[
    str, AfterValidator(_only_known), Field(json_schema_extra={"enum": list(CODES)})
]


def _only_text(value: Any) -> Any:
    """Refuse what lax parsing would take for a UUID or a time, such as a bare number."""
    if isinstance(value, str | UUID | datetime):
        return value
    raise ValueError("must be a string")


def _within_an_era(value: datetime) -> datetime:
    """Refuse times so far off that converting them to UTC or storing them would overflow."""
    if 1970 <= value.year <= 9000:
        return value
    raise ValueError("must be between the years 1970 and 9000")


class _FromText:
    """Strict everywhere but for the two types that JSON can only write as strings.

    pydantic's own reader of JSON knows them; Python values that come from elsewhere may be text.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        lax: Any = {**schema, "strict": False}
        return core_schema.json_or_python_schema(
            json_schema=schema,
            python_schema=core_schema.no_info_before_validator_function(_only_text, lax),
        )


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class WholeNumber:
    """Strict, but that ``3.0`` is 3, as JSON Schema has it. Stands after the field's range.

    pydantic's own reader of JSON takes digits only. What it refuses of a heartbeat is read again
    from Python values, so those that are written as usual cost no more for this.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        return core_schema.json_or_python_schema(
            json_schema=schema,
            python_schema=core_schema.no_info_before_validator_function(_as_whole, schema),
        )


Uuid = Annotated[UUID, _FromText()]
Time = Annotated[AwareDatetime, _FromText(), AfterValidator(_within_an_era)]
# A word is one word of a routing key.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# Text for people may hold anything that is printed as itself: no C0, C1 or DEL, no line or
# direction marks that make one thing look like another, and no NUL, which jsonb cannot hold.
_PRINTED = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]*$"
Name = Annotated[str, Field(pattern=_PRINTED, max_length=255)]
Line = Annotated[str, Field(pattern=_PRINTED, max_length=512)]
Percent = Annotated[float, Field(ge=0, le=100)]
Gigabytes = Annotated[float, Field(ge=0, le=MAX_GB)]
Whole = Annotated[int, WholeNumber()]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT), WholeNumber()]
Ordinal = Annotated[int, Field(ge=0, le=MAX_INTEGER), WholeNumber()]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Load = Annotated[float, Field(ge=0, le=MAX_COUNT)]
Vendor = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]
Capabilities = Annotated[
    list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,64}$")]], Field(max_length=64)
]


def absent_if_empty(value: Any) -> bool:
    """Whether a field is left out of a body: for those that only few ask for or have."""
    return value is None or value == []


class Message(BaseModel):
    """A body of the contract: unknown fields are ignored, and nothing is converted."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class OnlyKnownFields(BaseModel):
    """Refuses fields that it does not have, by name and with the nearest that it has."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, given: Any) -> Any:
        unknown = given.keys() - cls.model_fields.keys() if isinstance(given, dict) else ()
        if unknown:
            name = min(map(str, unknown))
            near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown field {shortened(name)}{hint}")
        return given


class Request(OnlyKnownFields, Message):
    """A body that asks: a filter that is ignored would offer machines that do not fit."""

    model_config = ConfigDict(extra="forbid")


def visible(text: str, longest: int = 255) -> str:
    """Return text from outside as a ``Name`` takes it: what is not printed as itself is U+FFFD."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)[:longest]


def shortened(text: str) -> str:
    """Return at most 64 characters of ``text`` with everything unprintable escaped."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= 64 else f"{escaped[:61]}..."
