"""The columns of the tables, and agents and offers as plain data."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chiffon.cli.output import Column, Row, age, gigabytes, plain

if TYPE_CHECKING:
    from chiffon.registry import AgentRow


def agent_data(agent: "AgentRow") -> dict[str, Any]:
    """Return an agent as JSON has it; times as ISO 8601, ages in seconds."""
    data = asdict(agent)
    for name in ("sent_at", "last_heartbeat_at"):
        data[name] = data[name].isoformat() if data[name] is not None else None
    data["agent_id"] = str(agent.agent_id)
    data["heartbeat_age_seconds"] = data.pop("age_seconds")
    data["is_silent"] = agent.age_seconds is None or agent.age_seconds > agent.lease_seconds
    data["resources"] = data.pop("resource_metrics")
    return data


def _metric(name: str) -> Any:
    def read(row: Row) -> Any:
        resources = row["resources"]
        return resources.get(name) if isinstance(resources, dict) else None

    return read


def _status(row: Row) -> str:
    # The sweep will mark it offline; until then it is not offered either.
    is_missed = row["is_silent"] and row["status"] != "offline"
    return f"{row['status']}, silent" if is_missed else str(row["status"])


def _vram(row: Row) -> str:
    free, total = (_metric(f"gpu_vram_{which}_gb")(row) for which in ("available", "total"))
    return "-" if total == 0 else f"{_size(free).removesuffix(' GiB')}/{_size(total)}"


def _percent(value: Any) -> str:
    return f"{value:.0f}%" if isinstance(value, int | float) else "-"


def _size(value: Any) -> str:
    return gigabytes(value if isinstance(value, int | float) else None)


FLEET = [
    Column("HOST", lambda row: plain(row["hostname"])),
    Column("POOL", lambda row: str(row["pool_name"])),
    Column("TYPE", lambda row: str(row["agent_type"])),
    Column("STATUS", _status),
    Column("HEARD", lambda row: age(row["heartbeat_age_seconds"]), is_number=True),
    Column("CPU", lambda row: _percent(_metric("cpu_percent")(row)), is_number=True),
    Column("FREE CORES", lambda row: plain(_metric("cpu_cores_available")(row)), is_number=True),
    Column("FREE MEMORY", lambda row: _size(_metric("memory_available_gb")(row)), True),
    Column("FREE/TOTAL VRAM", _vram, is_number=True),
    Column("GPU", lambda row: plain(_metric("gpu_type")(row))),
    Column("AGENT", lambda row: str(row["agent_id"])),
]

OFFERS = [
    Column("HOST", lambda row: plain(row["hostname"])),
    Column("POOL", lambda row: str(row["pool_name"])),
    Column("TYPE", lambda row: str(row["agent_type"])),
    Column("FREE VRAM", lambda row: gigabytes(row["gpu_vram_available_gb"]), is_number=True),
    Column("ON ONE GPU", lambda row: gigabytes(row["gpu_vram_max_available_gb"]), is_number=True),
    Column("TOTAL VRAM", lambda row: gigabytes(row["gpu_vram_total_gb"]), is_number=True),
    Column("GPU", lambda row: plain(row["gpu_type"])),
    Column("FREE CORES", lambda row: plain(row["cpu_cores_available"]), is_number=True),
    Column("LOAD", lambda row: plain(row["cpu_load_1min"]), is_number=True),
    Column("FREE MEMORY", lambda row: gigabytes(row["memory_available_gb"]), is_number=True),
    Column("HEARD", lambda row: age(row["heartbeat_age_seconds"]), is_number=True),
    Column("AGENT", lambda row: str(row["agent_id"])),
]
