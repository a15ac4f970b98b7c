"""Idempotency keys that all servers of a usage store share; in SQLite also the keys that wait for the store."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the columns of the server that works on a key."""
    op.add_column("idempotency_keys", sa.Column("holder", sa.Text, nullable=False, server_default=""))
    op.add_column("idempotency_keys", sa.Column("held_until", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("idempotency_keys", sa.Column("wanted", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("ix_idempotency_keys_holder", "idempotency_keys", ["holder"])
    if op.get_bind().dialect.name != "postgresql":
        op.create_table(
            "unsent_keys",
            sa.Column("digest", sa.Text, primary_key=True),
            sa.Column("revision", sa.BigInteger, nullable=False),
        )


def downgrade() -> None:
    """Drop the columns; each server then has its own keys."""
    if op.get_bind().dialect.name != "postgresql":
        op.drop_table("unsent_keys")
    op.drop_index("ix_idempotency_keys_holder", "idempotency_keys")
    for column in ("wanted", "held_until", "holder"):
        op.drop_column("idempotency_keys", column)
