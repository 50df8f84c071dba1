"""What a URL of the database may say."""

from typing import Any

import pytest

from chiffon.errors import BadConfiguration
from chiffon.registry.database_url import parse


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://u:p@rig/x", [("rig", 5432)]),
        ("postgresql+asyncpg://u:p@rig:7000/x", [("rig", 7000)]),
        ("postgres://u:p@a:1,b:2,c/x", [("a", 1), ("b", 2), ("c", 5432)]),
        ("postgresql://u:p@[::1]:7000,b/x", [("::1", 7000), ("b", 5432)]),
        ("postgresql://u:p@%2Frun%2Fpostgresql/x", [("/run/postgresql", 5432)]),
        ("postgresql:///x?host=/run/postgresql", [("/run/postgresql", 5432)]),
        ("postgresql:///x?host=a,b&port=7000", [("a", 7000), ("b", 7000)]),
        ("postgresql://u@a,b/x?port=1,2", [("a", 1), ("b", 2)]),
        ("postgresql://u@/x", [None]),
    ],
)
def test_hosts_and_ports_are_those_that_libpq_would_use(url: str, hosts: list[Any]) -> None:
    assert list(parse(url).hosts) == hosts


def test_a_password_may_hold_what_is_percent_encoded() -> None:
    parsed = parse("postgresql://an%40user:p%3A%2F%40ss@rig/a%20base")

    assert parsed.driver["user"] == "an@user"
    assert parsed.driver["password"] == "p:/@ss"
    assert parsed.driver["database"] == "a base"


def test_of_several_hosts_the_one_that_takes_writes_is_meant() -> None:
    assert parse("postgresql://a,b/x").driver["target_session_attrs"] == "read-write"
    asked = parse("postgresql://a,b/x?target_session_attrs=primary")
    assert asked.driver["target_session_attrs"] == "primary"
    assert "target_session_attrs" not in parse("postgresql://a/x").driver


def test_what_libpq_knows_and_asyncpg_can_do_is_taken() -> None:
    parsed = parse(
        "postgresql://u@h/x?sslmode=verify-full&sslrootcert=/a&sslcert=/b&sslkey=/c"
        "&sslpassword=d&sslcrl=/e&ssl_min_protocol_version=TLSv1.3&passfile=/f&service=g"
        "&connect_timeout=2&application_name=me&load_balance_hosts=random&client_encoding=UTF8"
        "&gssencmode=prefer&channel_binding=prefer&krbsrvname=k&gsslib=gssapi&sslnegotiation=direct"
        "&options=-c%20search_path%3Dours%20--work_mem=8MB"
    )

    assert parsed.settings == {"search_path": "ours", "work_mem": "8MB"}
    assert (parsed.application_name, parsed.connect_seconds) == ("me", 2.0)
    assert parsed.is_balanced
    assert parsed.driver["passfile"] == "/f"
    assert "sslmode=verify-full" in parsed.driver["dsn"]
    assert "sslpassword=d" in parsed.driver["dsn"]


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("mysql://u@h/x", "not a PostgreSQL URL"),
        ("h/x", "not a PostgreSQL URL"),
        ("postgresql://u:p@h:seven/x", "a bad port"),
        ("postgresql://u:a/b@h/x", "a bad port"),
        ("postgresql://h:70000/x", "a bad port for host h"),
        ("postgresql://a,,b/x", "a host without a name"),
        ("postgresql://a,b,c/x?port=1,2", "2 ports for 3 hosts"),
        ("postgresql://h/x?sslmod=require", "did you mean sslmode"),
        ("postgresql://h/x?search_path=ours", "options=-c%20name=value"),
        ("postgresql://h/x?sslmode=maybe", "sslmode=maybe: chiffon can use"),
        ("postgresql://h/x?target_session_attrs=standby", "target_session_attrs=standby"),
        ("postgresql://h/x?channel_binding=require", "channel_binding=require"),
        ("postgresql://h/x?gssencmode=require", "gssencmode=require"),
        ("postgresql://h/x?client_encoding=LATIN1", "client_encoding=LATIN1"),
        ("postgresql://h/x?keepalives_idle=3", "keepalives_idle"),
        ("postgresql://h/x?hostaddr=1.2.3.4", "hostaddr"),
        ("postgresql://h/x?replication=database", "replication"),
        ("postgresql://h/x?prepared_statements=maybe", "auto|on|off"),
        ("postgresql://h/x?options=-B%204", "only -c name=value"),
        ("postgresql://h/x?options=-c%20'", "options"),
    ],
)
def test_the_rest_is_refused_by_name(url: str, named: str) -> None:
    with pytest.raises(BadConfiguration, match="CHIFFON_DATABASE_URL") as refused:
        parse(url)

    assert named in str(refused.value)
