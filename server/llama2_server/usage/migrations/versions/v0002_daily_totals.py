"""Daily totals, which triggers keep in the transactions of the records; in SQLite also the state of one server."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

KEYS = ("account", "day", "model")
# The value that a record adds to each total, as an SQL expression of its row.
ADDED = {
    "requests": "1",
    "cached_requests": "CASE WHEN {row}.served_from_cache THEN 1 ELSE 0 END",
    "input_tokens": "CASE WHEN {row}.served_from_cache THEN 0 ELSE {row}.input_tokens END",
    "output_tokens": "CASE WHEN {row}.served_from_cache THEN 0 ELSE {row}.output_tokens END",
    "cached_input_tokens": "CASE WHEN {row}.served_from_cache THEN {row}.input_tokens ELSE 0 END",
    "cached_output_tokens": "CASE WHEN {row}.served_from_cache THEN {row}.output_tokens ELSE 0 END",
    "nanoneurons": "{row}.nanoneurons",
}


def upgrade() -> None:
    """Create the tables and triggers, and add the existing records."""
    op.create_table(
        "usage_daily_totals",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        *(sa.Column(total, sa.BigInteger, nullable=False) for total in ADDED),
    )
    columns = ", ".join((*KEYS, *ADDED))
    sums = ", ".join(f"sum({value.format(row='usage_records')})" for value in ADDED.values())
    keys = ", ".join(KEYS)
    op.execute(f"INSERT INTO usage_daily_totals ({columns}) SELECT {keys}, {sums} FROM usage_records GROUP BY {keys}")  # noqa: S608 - constants
    if op.get_bind().dialect.name == "postgresql":
        _create_postgresql_trigger()
    else:
        _create_sqlite_triggers()
        _create_local_tables()


def downgrade() -> None:
    """Drop the tables and triggers."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER usage_records_totals ON usage_records")
        op.execute("DROP FUNCTION usage_records_totals()")
    else:
        for event in ("insert", "update", "delete"):
            op.execute(f"DROP TRIGGER usage_records_{event}")
        op.drop_table("rejected_records")
        op.drop_table("running_requests")
    op.drop_table("usage_daily_totals")


def _add(row: str, sign: str = "") -> str:
    """Return the statement that adds a record, or with the sign `-` subtracts it."""
    columns = ", ".join((*KEYS, *ADDED))
    values = ", ".join([*(f"{row}.{key}" for key in KEYS), *(f"{sign}({v.format(row=row)})" for v in ADDED.values())])
    sums = ", ".join(f"{total} = usage_daily_totals.{total} + excluded.{total}" for total in ADDED)
    return (
        f"INSERT INTO usage_daily_totals ({columns}) VALUES ({values}) "  # noqa: S608 - constants
        f"ON CONFLICT ({', '.join(KEYS)}) DO UPDATE SET {sums};"
    )


def _subtract() -> str:
    same = " AND ".join(f"usage_daily_totals.{key} = OLD.{key}" for key in KEYS)
    return f"{_add('OLD', '-')} DELETE FROM usage_daily_totals WHERE {same} AND requests = 0;"  # noqa: S608 - constants


def _create_postgresql_trigger() -> None:
    op.execute(
        "CREATE FUNCTION usage_records_totals() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP <> 'DELETE' THEN {_add('NEW')} END IF; "
        f"IF TG_OP <> 'INSERT' THEN {_subtract()} END IF; "
        "RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER usage_records_totals AFTER INSERT OR UPDATE OR DELETE ON usage_records "
        "FOR EACH ROW EXECUTE FUNCTION usage_records_totals()"
    )


def _create_sqlite_triggers() -> None:
    bodies = {"insert": _add("NEW"), "update": f"{_add('NEW')} {_subtract()}", "delete": _subtract()}
    for event, body in bodies.items():
        op.execute(f"CREATE TRIGGER usage_records_{event} AFTER {event} ON usage_records BEGIN {body} END")


def _create_local_tables() -> None:
    op.create_table(
        "running_requests",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("instance", sa.Text, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("neuron_costs", sa.Text, nullable=False),
    )
    op.create_table(
        "rejected_records",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("sqlstate", sa.Text, nullable=False),
    )
