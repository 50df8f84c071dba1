"""``chiffon reservation``: what is reserved, over AMQP, as a planner asks."""

from enum import StrEnum
from typing import Annotated
from uuid import UUID

import typer

from chiffon.cli.columns import RESERVATIONS
from chiffon.cli.needs import TimeoutOption, ask, question
from chiffon.cli.output import FormatOption, note, show_many, show_one

app = typer.Typer(
    help="What is reserved, and by whom, over AMQP.", no_args_is_help=True, rich_markup_mode=None
)

IdArgument = Annotated[UUID, typer.Argument(metavar="RESERVATION", help="The reservation's id.")]
FenceOption = Annotated[int | None, typer.Option(help="Must be its own, if given.")]


class State(StrEnum):
    """The states of a reservation, or all of them."""

    held = "held"
    released = "released"
    expired = "expired"
    revoked = "revoked"
    any = "any"


@app.command("list")
def list_reservations(
    state: Annotated[State, typer.Option(help="Only these.")] = State.held,
    holder: Annotated[str | None, typer.Option(help="Only this holder's.")] = None,
    agent_id: Annotated[UUID | None, typer.Option(help="Only those on this agent.")] = None,
    limit: Annotated[int, typer.Option(help="At most, 1 to 1000.")] = 100,
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """List reservations, newest first. Those that are over are known for a day."""
    from chiffon.contract.messages import ReservationList

    wanted = question(
        ReservationList,
        state=None if state is State.any else state.value,
        holder=holder,
        agent_id=agent_id,
        limit=limit,
    )
    found = ask(lambda planner, seconds: planner.reservations(wanted, timeout=seconds), timeout)
    rows = found.model_dump(mode="json")["reservations"]
    show_many([{**row, "as_of": found.as_of.isoformat()} for row in rows], RESERVATIONS, output)
    if not rows:
        note("nothing is reserved" if state is State.held else "no reservation fits")
    if len(rows) == limit:
        note(f"the newest {limit}; --limit shows more")


@app.command()
def show(
    reservation: IdArgument, timeout: TimeoutOption = None, output: FormatOption = None
) -> None:
    """Show one reservation. Exit code 3 if there is no such reservation."""
    found = ask(lambda planner, seconds: planner.reservation(reservation, timeout=seconds), timeout)
    show_one(found.model_dump(mode="json"), output)


@app.command()
def renew(
    reservation: IdArgument,
    fence: FenceOption = None,
    lease_seconds: Annotated[float | None, typer.Option(help="Default: as before.")] = None,
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """Let its lease begin anew. Exit code 3 if it is over."""
    from chiffon.contract.messages import ReservationRenew

    request = question(
        ReservationRenew, reservation_id=reservation, fence=fence, lease_seconds=lease_seconds
    )
    found = ask(lambda planner, seconds: planner.renew(request, timeout=seconds), timeout)
    show_one(found.model_dump(mode="json"), output)


@app.command()
def release(
    reservation: IdArgument,
    fence: FenceOption = None,
    timeout: TimeoutOption = None,
    output: FormatOption = None,
) -> None:
    """Give its room back. Exit code 3 if it is over otherwise."""
    from chiffon.contract.messages import ReservationRelease

    request = question(ReservationRelease, reservation_id=reservation, fence=fence)
    found = ask(lambda planner, seconds: planner.release(request, timeout=seconds), timeout)
    show_one(found.model_dump(mode="json"), output)
