"""Settings: where they come from, and what stops the start."""

import fcntl
from dataclasses import fields
from pathlib import Path

import pytest

from chiffon.errors import BadConfiguration
from chiffon.probes.operator import OperatorWord
from chiffon.settings import Settings, default_state_folder, describe, load


@pytest.fixture(autouse=True)
def _own_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHIFFON_STATE_DIR", str(tmp_path))


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIFFON_POOL_NAME", "office")

    assert load().pool_name == "office"
    assert load(pool_name="lab").pool_name == "lab"
    assert load(pool_name=None).pool_name == "office"


def test_words_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIFFON_CAPABILITIES", "gpu, cuda12,")

    assert load().capabilities == ["gpu", "cuda12"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CHIFFON_AMPQ_URL", "x", "did you mean CHIFFON_AMQP_URL?"),
        ("CHIFFON_POOL_NAME", "", "CHIFFON_POOL_NAME is set but empty"),
        ("CHIFFON_POOL_NAME", " a", "CHIFFON_POOL_NAME begins or ends with a space"),
        ("CHIFFON_POOL_NAME", "a.b", "CHIFFON_POOL_NAME:"),
        ("CHIFFON_AGENT_TYPE", "toaster", "CHIFFON_AGENT_TYPE:"),
        ("CHIFFON_HEARTBEAT_INTERVAL_SECONDS", "0", "CHIFFON_HEARTBEAT_INTERVAL_SECONDS:"),
        ("CHIFFON_HEARTBEAT_INTERVAL_SECONDS", "nan", "CHIFFON_HEARTBEAT_INTERVAL_SECONDS:"),
        ("CHIFFON_KEPT_MEMORY_GB", "-1", "CHIFFON_KEPT_MEMORY_GB:"),
        ("CHIFFON_KEPT_CPU_CORES", "inf", "CHIFFON_KEPT_CPU_CORES:"),
        ("CHIFFON_OVERRIDE_MEMORY_TOTAL_GB", "0", "CHIFFON_OVERRIDE_MEMORY_TOTAL_GB:"),
        ("CHIFFON_OVERRIDE_GPU_TYPE", "NVIDIA", "CHIFFON_OVERRIDE_GPU_TYPE:"),
        ("CHIFFON_OVERIDE_GPU_TYPE", "amd", "did you mean CHIFFON_OVERRIDE_GPU_TYPE?"),
        ("CHIFFON_INTEGRATED_GPUS", "maybe", "CHIFFON_INTEGRATED_GPUS:"),
        ("CHIFFON_REPLY_FORMS", "carrier-pigeon", "CHIFFON_REPLY_FORMS:"),
    ],
)
def test_a_bad_setting_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(BadConfiguration) as refused:
        load()

    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_setting_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIFFON_AMQP_URL", "amqp://bob:hunter2@h/v")
    monkeypatch.setenv("CHIFFON_DATABASE_URL", "postgresql://bob:hunter2@h/v")

    settings = load()

    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()}"
    assert describe(settings.amqp_url) == "amqp://bob:***@h/v"


def write_addresses(folder: Path) -> None:
    (folder / "up.env").write_text(
        "CHIFFON_AMQP_URL=amqp://up/\nCHIFFON_DATABASE_URL=postgresql://up/x\n"
    )


def test_the_addresses_of_a_running_up_are_used(tmp_path: Path) -> None:
    write_addresses(tmp_path)
    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        assert load().amqp_url.get_secret_value() == "amqp://up/"


def test_they_are_used_all_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_addresses(tmp_path)
    monkeypatch.setenv("CHIFFON_AMQP_URL", "amqp://mine/")
    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        settings = load()

    default = Settings.model_fields["database_url"].default
    assert settings.amqp_url.get_secret_value() == "amqp://mine/"
    assert settings.database_url == default


def test_a_stale_address_file_is_reported_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_addresses(tmp_path)
    (tmp_path / "up.lock").touch()

    settings = load()

    assert "up.env is stale" in caplog.text
    assert settings.amqp_url == Settings.model_fields["amqp_url"].default


def test_state_is_kept_per_user_and_for_root_in_var(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x/state")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_state_folder() == Path("/x/state/chiffon")

    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_state_folder() == Path("/var/lib/chiffon")


def test_all_that_the_operator_may_say_is_a_setting() -> None:
    settings = load()

    for field in fields(OperatorWord):
        assert getattr(settings, field.name) == field.default, field.name
