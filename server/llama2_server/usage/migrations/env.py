"""Alembic's way in: runs the migrations on the connection that `store.py` hands over, within its transaction."""

from alembic import context

from llama2_server.usage.schema import METADATA
from llama2_server.usage.store import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE
)
context.run_migrations()
