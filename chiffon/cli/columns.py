"""The columns of the tables."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chiffon.cli.output import Column, Row, age, gigabytes, plain

if TYPE_CHECKING:
    from chiffon.agent.preview import Preview
    from chiffon.contract.messages import Gpu


def heartbeat_rows(
    shown: "Preview", settings: Collection[str], options: Collection[str]
) -> list[Row]:
    """Return a row for each value of a heartbeat: what it is, and where it is from.

    Args:
        shown: The heartbeat.
        settings: The names of the settings that somebody set.
        options: Those of them that are from the command line.
    """
    update = shown.update
    kept = "agent.json" if shown.is_kept else "new, and not kept: no agent has run here"
    rows: list[Row] = [
        {"name": "agent_id", "value": str(update.agent_id), "source": kept},
        {"name": "hostname", "value": update.hostname, "source": "gethostname(2)"},
    ]
    for name, setting in _FROM_SETTINGS.items():
        source = f"CHIFFON_{setting.upper()}" + ("" if setting in settings else ", its default")
        if setting in options:
            source = f"--{setting.replace('_', '-')}"
        rows.append({"name": name, "value": getattr(update, name), "source": source})
    rows += [
        {
            "name": reading.name,
            "value": reading.value,
            "origin": _origin(reading.value, reading.is_overridden),
            "source": reading.source if reading.problem is None else reading.problem,
            "seconds": reading.seconds,
        }
        for reading in shown.readings
    ]
    resources = update.resources
    for gpu in resources.gpus if resources else []:
        rows.append({"name": f"gpus[{gpu.index}]", "value": _gpu(gpu), "source": gpu.uuid or ""})
    if resources is not None and resources.gpu_sample_age_seconds is not None:
        age_seconds = f"{resources.gpu_sample_age_seconds:.2f}"
        rows.append({"name": "gpu_sample_age_seconds", "value": age_seconds, "source": ""})
    return rows


_FROM_SETTINGS = {
    "agent_type": "agent_type",
    "pool_name": "pool_name",
    "capabilities": "capabilities",
    "interval_seconds": "heartbeat_interval_seconds",
}


def _origin(value: Any, is_overridden: bool) -> str:
    if value is None:
        return "unknown"
    return "overridden" if is_overridden else "detected"


def _gpu(gpu: "Gpu") -> str:
    free, total = _size(gpu.vram_available_gb), _size(gpu.vram_total_gb)
    use = "?" if gpu.utilization_percent is None else f"{gpu.utilization_percent:.0f}%"
    unified = ", the host's memory" if gpu.is_unified else ""
    return f"{gpu.name or '?'}: {free} of {total} free{unified}, {use} busy"


def _took(row: Row) -> str:
    seconds = row.get("seconds")
    return "" if seconds is None else f"{seconds * 1_000:.1f} ms"


def _metric(name: str) -> Any:
    def read(row: Row) -> Any:
        resources = row["resources"]
        return resources.get(name) if isinstance(resources, dict) else None

    return read


def _status(row: Row) -> str:
    # The sweep will mark it offline; until then it is not offered either.
    is_missed = row["is_silent"] and row["status"] != "offline"
    if is_missed:
        return f"{row['status']}, silent"
    reason = f": {row['status_reason']}" if row["status_reason"] else ""
    drained = ", drained" if row["drained"] else ""
    return f"{row['status']}{reason}{drained}"


def _free(metric: str, amount: str) -> Any:
    """Return what reads how much can be taken: what is reserved is not free."""

    def read(row: Row) -> Any:
        reported = _metric(metric)(row)
        return reported if reported is None or not row["available"] else row["available"][amount]

    return read


_free_vram = _free("gpu_vram_available_gb", "gpu_vram_gb")
_free_cores = _free("cpu_cores_available", "cpu_cores")
_free_memory = _free("memory_available_gb", "memory_gb")


def _vram(row: Row) -> str:
    free, total = _free_vram(row), _metric("gpu_vram_total_gb")(row)
    return "-" if total == 0 else f"{_size(free).removesuffix(' GiB')}/{_size(total)}"


def _percent(value: Any) -> str:
    return f"{value:.0f}%" if isinstance(value, int | float) else "-"


def _size(value: Any) -> str:
    return gigabytes(value if isinstance(value, int | float) else None)


FLEET = [
    Column("HOST", lambda row: plain(row["hostname"])),
    Column("POOL", lambda row: str(row["pool_name"]), rank=3),
    Column("TYPE", lambda row: str(row["agent_type"]), rank=6),
    Column("STATUS", _status),
    Column("HEARD", lambda row: age(row["heartbeat_age_seconds"]), is_number=True, rank=2),
    Column("CPU", lambda row: _percent(_metric("cpu_percent")(row)), is_number=True, rank=5),
    Column("FREE CORES", lambda row: plain(_free_cores(row)), is_number=True),
    Column("FREE MEMORY", lambda row: _size(_free_memory(row)), is_number=True, rank=4),
    Column("FREE/TOTAL VRAM", _vram, is_number=True),
    Column("GPU", lambda row: plain(_metric("gpu_type")(row))),
    Column("AGENT", lambda row: str(row["agent_id"]), rank=1, is_id=True),
]


def _last_known(row: Row) -> str:
    return _status({**row, "is_silent": False})


FLEET_LAST_KNOWN = [
    replace(column, cell=_last_known) if column.title == "STATUS" else column for column in FLEET
]
"""While no heartbeats are recorded, silence says nothing about an agent."""

OFFERS = [
    Column("HOST", lambda row: plain(row["hostname"])),
    Column("POOL", lambda row: str(row["pool_name"]), rank=5),
    Column("TYPE", lambda row: str(row["agent_type"]), rank=7),
    Column("FREE VRAM", lambda row: gigabytes(row["gpu_vram_available_gb"]), is_number=True),
    Column("ON ONE GPU", lambda row: gigabytes(row["gpu_vram_max_available_gb"]), True, rank=2),
    Column("TOTAL VRAM", lambda row: gigabytes(row["gpu_vram_total_gb"]), True, rank=6),
    Column("GPU", lambda row: plain(row["gpu_type"])),
    Column("FREE CORES", lambda row: plain(row["cpu_cores_available"]), is_number=True),
    Column("LOAD", lambda row: plain(row["cpu_load_1min"]), is_number=True, rank=8),
    Column("FREE MEMORY", lambda row: gigabytes(row["memory_available_gb"]), True, rank=3),
    Column("HEARD", lambda row: age(row["heartbeat_age_seconds"]), is_number=True, rank=4),
    Column("AGENT", lambda row: str(row["agent_id"]), rank=1, is_id=True),
]


def _reported(name: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    def read(row: Row) -> str:
        reported = row.get("reported") or {}
        return show(reported.get(name))

    return read


OFFERS_AS_REPORTED = [
    *OFFERS[:-1],
    Column("VRAM BEFORE", _reported("gpu_vram_available_gb", gigabytes), is_number=True),
    Column("CORES BEFORE", _reported("cpu_cores_available", plain), is_number=True),
    Column("MEMORY BEFORE", _reported("memory_available_gb", gigabytes), is_number=True),
    OFFERS[-1],
]


def _until(row: Row) -> str:
    from datetime import datetime

    if row["ended_at"] is not None:
        return f"{row['state']}: {row['reason']}"
    left = datetime.fromisoformat(row["expires_at"]) - datetime.fromisoformat(row["as_of"])
    return age(max(left.total_seconds(), 0.0))


def _hosts(row: Row) -> str:
    return ",".join(str(one["hostname"] or one["agent_id"]) for one in row["places"])


def _gpus(row: Row) -> str:
    gpus = sum(len(one["gpus"]) for one in row["places"])
    return f"{gpus} x {gigabytes(row['gpu_vram_gb'])}" if gpus else "-"


def _each(row: Row) -> float:
    return row["gpus"][0]["vram_gb"] if row["gpus"] else 0.0


RESERVATIONS = [
    Column("HOLDER", lambda row: plain(row["holder"])),
    Column("HOST", _hosts),
    Column("VRAM", _gpus, is_number=True),
    Column("CORES", lambda row: plain(row["cpu_cores"]), is_number=True),
    Column("MEMORY", lambda row: gigabytes(row["memory_gb"]), is_number=True),
    Column("ENDS IN", _until, is_number=True),
    Column("FENCE", lambda row: plain(row["fence"]), is_number=True),
    Column("RESERVATION", lambda row: str(row["reservation_id"])),
]

RESERVED = [
    Column("VRAM", lambda row: _gpus({"places": [row], "gpu_vram_gb": _each(row)}), True),
    Column("CORES", lambda row: plain(row["cpu_cores"]), is_number=True),
    Column("MEMORY", lambda row: gigabytes(row["memory_gb"]), is_number=True),
    Column("FENCE", lambda row: plain(row["fence"]), is_number=True),
    Column("RESERVATION", lambda row: str(row["reservation_id"])),
]

READINGS = [
    Column("FIELD", lambda row: str(row["name"])),
    Column("VALUE", lambda row: plain(row["value"])),
    Column("IS", lambda row: str(row.get("origin", ""))),
    Column("FROM", lambda row: str(row["source"])),
    Column("TOOK", _took, is_number=True),
]

EVENTS = [
    Column("AT", lambda row: str(row["at"])),
    Column("WHAT", lambda row: str(row.get("status") or row.get("state"))),
    Column("POOL", lambda row: plain(row.get("pool_name"))),
    Column("HOST", lambda row: plain(row.get("hostname"))),
    Column("REASON", lambda row: plain(row.get("reason"))),
    Column("ID", lambda row: plain(row.get("reservation_id") or row.get("agent_id"))),
]
