"""The settings of a host's agent, as its process and ``chiffon agent probe`` apply them alike."""

from dataclasses import fields

from chiffon.agent.base_agent import BaseAgent
from chiffon.agent.identity import Identity
from chiffon.probes.operator import OperatorWord
from chiffon.probes.reader import Reader
from chiffon.settings import Settings


async def reader_of(settings: Settings) -> Reader:
    """Open what reads this host, with what the operator says of it."""
    said = {field.name: getattr(settings, field.name) for field in fields(OperatorWord)}
    return await Reader.open(
        settings.heartbeat_interval_seconds,
        OperatorWord(**said),
        state_folder=settings.state_folder,
    )


def agent_of(settings: Settings, who: Identity, reader: Reader) -> BaseAgent:
    """Return this host's agent; it is the caller's to enter."""
    return BaseAgent(
        settings.amqp_url.get_secret_value(),
        identity=who,
        agent_type=settings.agent_type,
        pool_name=settings.pool_name,
        capabilities=settings.capabilities,
        interval_seconds=settings.heartbeat_interval_seconds,
        resources=reader,
    )
