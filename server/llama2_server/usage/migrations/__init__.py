"""Migrations of the usage database, the same for SQLite and PostgreSQL."""

import threading
from importlib import resources

import sqlalchemy as sa

from llama2_server.usage.errors import NewerSchema

VERSION_TABLE = "llama2_usage_version"
CURRENT_VERSION = "0006"
"""The last migration in `versions`."""
# A fixed number of this project: servers that start at the same time migrate one after the other.
ADVISORY_LOCK = 0x11A3A2
# Alembic keeps its context in module globals, so a process runs one migration at a time.
_alembic_lock = threading.Lock()


def upgrade(connection: sa.Connection) -> None:
    """Migrate to the current version, in the transaction of the connection.

    Raises:
        NewerSchema: a newer version of this service has migrated the database.
    """
    if connection.dialect.name == "postgresql":  # in SQLite, the transaction has already locked the file
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    if _version(connection) != CURRENT_VERSION:
        _migrate(connection)


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()  # noqa: S608
    return version


def _migrate(connection: sa.Connection) -> None:
    # Most starts find the current version, and these imports take a tenth of such a start.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    scripts = str(resources.files("llama2_server") / "usage" / "migrations")
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    config.attributes["connection"] = connection
    with _alembic_lock:
        try:
            command.upgrade(config, "head")
        except CommandError as error:  # the version in the database is unknown
            raise NewerSchema from error
