"""What the database itself saw: every change of a status, and every step backward.

A trigger writes it down, so no change is too short to be seen.
"""

from dataclasses import dataclass
from uuid import UUID

import asyncpg

from chiffon.embedded.postgres import asyncpg_url

_INSTALL = """
CREATE TABLE audit (
  id bigint GENERATED ALWAYS AS IDENTITY, agent_id uuid NOT NULL, was text, became text,
  reason text, is_backward boolean NOT NULL);
CREATE FUNCTION audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.status IS DISTINCT FROM OLD.status
     OR (NEW.incarnation, NEW.sequence) < (OLD.incarnation, OLD.sequence) THEN
    INSERT INTO audit (agent_id, was, became, reason, is_backward)
    VALUES (NEW.agent_id, OLD.status, NEW.status, NEW.status_reason,
            (NEW.incarnation, NEW.sequence) < (OLD.incarnation, OLD.sequence));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER audit AFTER UPDATE ON agent_registry
  FOR EACH ROW EXECUTE FUNCTION audit_change();
"""


@dataclass(frozen=True)
class Change:
    """One change of one row."""

    agent_id: UUID
    was: str
    became: str
    reason: str | None
    is_backward: bool

    @property
    def is_marking(self) -> bool:
        """Whether a sweep marked it offline."""
        return self.became == "offline" and self.was != "offline" and self.reason != "farewell"


async def install(database_url: str) -> None:
    """Have every change written down from now on."""
    connection = await asyncpg.connect(asyncpg_url(database_url))
    try:
        await connection.execute(_INSTALL)
    finally:
        await connection.close()


async def take(database_url: str) -> list[Change]:
    """Return what was written down since the last call, oldest first."""
    connection = await asyncpg.connect(asyncpg_url(database_url), timeout=5)
    try:
        rows = await connection.fetch(
            "WITH taken AS (DELETE FROM audit RETURNING *)"
            " SELECT agent_id, was, became, reason, is_backward FROM taken ORDER BY id"
        )
    finally:
        await connection.close()
    return [Change(*row) for row in rows]
