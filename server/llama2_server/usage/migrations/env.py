"""Alembic's entry point: runs the migrations on the connection and in the transaction of `store.py`."""

from alembic import context

from llama2_server.usage.schema import METADATA
from llama2_server.usage.store import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE
)
context.run_migrations()
