"""Reservations in the monthly budgets of accounts."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "budget_reservations",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("nanoneurons", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_budget_reservations_account_day", "budget_reservations", ["account", "day"])


def downgrade() -> None:
    """Drop the table; the requests that run are then outside the budgets."""
    op.drop_table("budget_reservations")
