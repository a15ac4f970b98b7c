"""Alembic's entry point: runs the migrations on the connection and in the transaction of `upgrade`."""

from alembic import context

from llama2_server.usage.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
