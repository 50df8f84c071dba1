"""The heartbeat that this host's agent would send, without sending it."""

from contextlib import closing
from dataclasses import dataclass

from chiffon.agent.identity import fresh, peek
from chiffon.agent.wiring import agent_of, reader_of
from chiffon.contract.messages import StatusUpdate
from chiffon.probes.sample import Reading
from chiffon.settings import Settings


@dataclass(frozen=True)
class Preview:
    """A heartbeat that was not sent, and where its readings are from.

    ``is_kept``: its agent id is that of this host's agent, and not made up for this once.
    """

    update: StatusUpdate
    is_kept: bool
    readings: list[Reading]
    notes: list[str]


async def preview(settings: Settings) -> Preview:
    """Return the heartbeat that this host's agent would send, and send nothing.

    The agent may be running meanwhile; a host that has none yet gets an id that is not kept.

    Raises:
        BadConfiguration: The settings cannot work, or the kept identity is not readable.
    """
    kept = peek(settings.state_folder)
    with closing(await reader_of(settings)) as reader:
        update = agent_of(settings, kept or fresh(), reader).compose(reader.read())
        return Preview(update, kept is not None, reader.readings, reader.notes)
