"""The registry in PostgreSQL: tables, migrations, and one module a subject beside ``sql``."""
