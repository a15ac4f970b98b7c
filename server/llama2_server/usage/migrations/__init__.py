"""Migrations of the usage database, the same for SQLite and PostgreSQL."""

import threading
from importlib import resources

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

VERSION_TABLE = "llama2_usage_version"
# A fixed number of this project: servers that start at the same time migrate one after the other.
ADVISORY_LOCK = 0x11A3A2
# Alembic keeps its context in module globals, so a process runs one migration at a time.
_alembic_lock = threading.Lock()


def upgrade(connection: sa.Connection) -> None:
    """Migrate to the current version, in the transaction of the connection.

    Raises:
        CommandError: a newer version of this service has migrated the database.
    """
    if connection.dialect.name == "postgresql":  # in SQLite, the transaction has already locked the file
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    config = Config()
    scripts = str(resources.files("llama2_server") / "usage" / "migrations")
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    config.attributes["connection"] = connection
    with _alembic_lock:
        command.upgrade(config, "head")
