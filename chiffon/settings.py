"""Settings, read from the environment by the processes and by nobody else.

Flag > environment (``CHIFFON_*``) > the address file of a running ``chiffon up`` > default. A name
that is misspelt, a value that is empty or cannot work: one line that names it, and no start.
"""

import difflib
import fcntl
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from chiffon.contract.codec import first_problem
from chiffon.contract.messages import AgentType
from chiffon.contract.topology import MOST_SHARDS, REPLY_FORMS
from chiffon.errors import BadConfiguration, masked

log = logging.getLogger(__name__)

PREFIX = "CHIFFON_"

ADDRESSES = ("amqp_url", "database_url", "http_url", "management_url")
"""What ``chiffon up`` writes down; used all or none."""

UP_FILE = "up.env"
UP_LOCK = "up.lock"


def _words(value: Any) -> Any:
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


Words = Annotated[list[str], NoDecode, BeforeValidator(_words)]


class Settings(BaseSettings):
    """Everything that can be set; each field is the variable ``CHIFFON_<NAME>``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    amqp_url: SecretStr = Field(
        SecretStr("amqp://guest:guest@127.0.0.1:5672/"),
        description="The broker; several hosts separated by commas.",
    )
    database_url: SecretStr = Field(
        SecretStr("postgresql://chiffon:chiffon@127.0.0.1:5432/chiffon"),
        description="The registry's PostgreSQL.",
    )
    http_url: str | None = Field(None, description="Where the gateway is, for those who look.")
    http_host: str = Field("127.0.0.1", description="Where the gateway listens.")
    http_port: int = Field(8440, ge=0, le=65_535)
    http_fd: int | None = Field(
        None, ge=3, description="A socket that listens already, inherited from who starts us."
    )
    http_allowed_hosts: Words = Field(
        default_factory=list,
        description="Host names that requests may be for; on a loopback address its own names.",
    )
    http_root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9_.~-]+)*$",
        description="The path under which a proxy shows the gateway, which it strips: /chiffon.",
    )
    http_trusted_proxies: Words = Field(
        default_factory=list,
        description="Addresses and networks whose X-Forwarded-* headers are believed.",
    )
    http_keep_alive_seconds: int = Field(
        75, ge=1, le=3_600, description="Longer than the proxy keeps its connections to us."
    )
    management_url: SecretStr | None = Field(
        None, description="Where RabbitMQ's management UI is, with user and password."
    )
    state_dir: Path | None = Field(None, description="Where identity, secrets and logs are kept.")
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    agent_type: AgentType = "desktop"
    pool_name: str = Field("default", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    capabilities: Words = Field(default_factory=list, description="Separated by commas.")
    heartbeat_interval_seconds: float = Field(5.0, ge=0.5, le=600, allow_inf_nan=False)

    # What the operator says of the host; the fields of probes.operator.OperatorWord.
    kept_cpu_cores: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)
    kept_memory_gb: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)
    kept_gpu_vram_gb: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)
    override_cpu_cores: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    override_cpu_cores_physical: int | None = Field(None, ge=0, le=1_000_000)
    override_memory_total_gb: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)
    override_gpu_type: str | None = Field(None, pattern=r"^[a-z0-9_-]{1,32}$")
    override_gpu_vram_total_gb: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    override_gpu_vram_available_gb: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    integrated_gpus: bool = False

    ingest_shards: int = Field(
        1, ge=1, le=MOST_SHARDS, description="Queues that share the fleet's heartbeats."
    )
    ingest_shard: int | None = Field(
        None, ge=1, description="The one of them that this orchestrator consumes; all if not given."
    )
    ingest_batch_size: int = Field(2_000, ge=1, le=10_000)
    ingest_batch_seconds: float = Field(0.02, ge=0, le=1, allow_inf_nan=False)
    sweep_interval_seconds: float = Field(1.0, ge=0.1, le=60, allow_inf_nan=False)
    outage_share: float = Field(0.55, gt=0, le=1, allow_inf_nan=False)
    outage_hold_seconds: float = Field(600.0, ge=0, le=86_400, allow_inf_nan=False)
    reservation_offline_seconds: float = Field(
        300.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="For how long what is reserved on an agent outlives its going offline.",
    )
    forget_offline_after_seconds: float = Field(
        7 * 86_400.0,
        ge=0,
        le=3_650 * 86_400.0,
        allow_inf_nan=False,
        description="Agents that are offline for so long are removed; 0 keeps them.",
    )
    reply_forms: Words = Field(
        default_factory=lambda: list(REPLY_FORMS),
        description="Which forms of reply_to the responder writes to.",
    )
    metrics_host: str = Field("127.0.0.1", description="Where agent and orchestrator listen.")
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="For metrics and health of agent and orchestrator."
    )
    metrics_agent_limit: int = Field(
        2_000, ge=0, le=100_000, description="Agents with series of their own, at the gateway."
    )
    rpc_timeout_seconds: float = Field(5.0, gt=0, le=3_600, allow_inf_nan=False)

    @property
    def state_folder(self) -> Path:
        """The state folder; the default is per user, for root ``/var/lib/chiffon``."""
        return self.state_dir or default_state_folder()


def default_state_folder() -> Path:
    """Return where state is kept when ``CHIFFON_STATE_DIR`` does not say."""
    if os.geteuid() == 0:
        return Path("/var/lib/chiffon")
    try:
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        raise BadConfiguration("this user has no home folder; set CHIFFON_STATE_DIR") from None
    return Path(home) / "chiffon"


def load(**flags: Any) -> Settings:
    """Read the settings.

    Args:
        **flags: Fields given on the command line; ``None`` means not given.

    Raises:
        BadConfiguration: Unknown name, empty or unusable value; one line that names it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_odd_names()
    if not any(PREFIX + name.upper() in os.environ or name in given for name in ADDRESSES):
        folder = Path(os.environ.get("CHIFFON_STATE_DIR") or default_state_folder())
        given = {**up_addresses(folder), **given}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        raise BadConfiguration(f"{PREFIX}{_named(error)}") from None
    _refuse_odd_forms(settings.reply_forms)
    if settings.ingest_shard is not None and settings.ingest_shard > settings.ingest_shards:
        raise BadConfiguration(
            f"{PREFIX}INGEST_SHARD: there is no shard {settings.ingest_shard} of "
            f"{settings.ingest_shards} ({PREFIX}INGEST_SHARDS)"
        )
    return settings


def up_addresses(folder: Path) -> dict[str, str]:
    """Return the addresses of the ``chiffon up`` that runs on this state folder.

    Returns:
        Field names and values; empty if none runs. A file that a killed ``up`` left behind is
        reported and not used.
    """
    path = folder / UP_FILE
    try:
        lines = path.read_text(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:
        log.warning("a `chiffon up` of another user runs here; %s is not readable", path)
        return {}
    if not is_locked(folder / UP_LOCK):
        log.warning("%s is stale: its `chiffon up` did not end cleanly; not used", path)
        return {}
    pairs = (line.partition("=") for line in lines if line.startswith(PREFIX))
    return {name.removeprefix(PREFIX).lower(): value for name, _, value in pairs}


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock file; a lock ends with its process."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def describe(url: SecretStr) -> str:
    """Return a URL for people, its password shown as ``***``."""
    return masked(url.get_secret_value())


def _refuse_odd_names() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, value in sorted(os.environ.items()):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadConfiguration(f"{name} is not a setting of chiffon{hint}")
        if name != f"{PREFIX}STATE_DIR" and not _is_text(value):
            raise BadConfiguration(f"{name} holds bytes that are no UTF-8")
        if not value.strip():
            raise BadConfiguration(f"{name} is set but empty; unset it or give it a value")
        if value != value.strip():
            raise BadConfiguration(f"{name} begins or ends with a space")


def _is_text(value: str) -> bool:
    """Return whether a value is text: bytes that are none stand in it as half characters."""
    return not any("\ud800" <= one <= "\udfff" for one in value)


def _refuse_odd_forms(forms: list[str]) -> None:
    if not forms or set(forms) - set(REPLY_FORMS):
        raise BadConfiguration(
            f"{PREFIX}REPLY_FORMS: must be one or more of {', '.join(REPLY_FORMS)}"
        )


def _named(error: ValidationError) -> str:
    field, _, rest = first_problem(error).partition(":")
    return f"{field.upper()}:{rest}"
