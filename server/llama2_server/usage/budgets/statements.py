"""The statements on reservations, the same in SQLite and PostgreSQL.

A reservation counts until its request has a record. So the record ends it in the same transaction, in any order of the
two, and no process has to be alive for that. The row is deleted later, to save space.
"""

from datetime import date
from decimal import Decimal
from typing import Any

from llama2_server.usage.budgets.budget import BudgetUse, Month, Reservation
from llama2_server.usage.schema import NEURON_DECIMALS

_IN_MONTH = "account = :account AND day >= :first_day AND day < :next_first_day"

SELECT_USE = (
    f"SELECT (SELECT coalesce(sum(nanoneurons), 0) FROM usage_daily_totals WHERE {_IN_MONTH}), "  # noqa: S608 - constants
    f"(SELECT coalesce(sum(nanoneurons), 0) FROM budget_reservations AS reserved WHERE {_IN_MONTH} "
    "AND NOT EXISTS (SELECT 1 FROM usage_records WHERE usage_records.request_id = reserved.request_id))"
)
"""The spent and the reserved neurons in billionths, with the parameters of `use_parameters`."""
INSERT = (
    "INSERT INTO budget_reservations (request_id, account, day, nanoneurons) "
    "VALUES (:request_id, :account, :day, :nanoneurons)"
)
"""Insert a reservation, with the parameters of `insert_parameters`."""
DELETE = "DELETE FROM budget_reservations WHERE request_id = :request_id"
LOCK_ACCOUNT = "SELECT pg_advisory_xact_lock(CAST(:namespace AS INTEGER), hashtext(CAST(:account AS TEXT)))"
"""In PostgreSQL: one reservation of an account at a time. In SQLite, a transaction that writes is alone."""
LOCK_NAMESPACE = 0x11A3A3


def use_parameters(account_id: str, month: Month) -> dict[str, Any]:
    """Return the parameters of SELECT_USE."""
    return {"account": account_id, "first_day": month.first_day, "next_first_day": month.next_first_day}


def insert_parameters(reservation: Reservation) -> dict[str, Any]:
    """Return the parameters of INSERT."""
    return {
        "request_id": reservation.request_id,
        "account": reservation.account_id,
        "day": reservation.day,
        "nanoneurons": int(reservation.neurons.scaleb(NEURON_DECIMALS)),
    }


def for_sqlite(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with days as text, because SQLite has no dates."""
    return {name: value.isoformat() if isinstance(value, date) else value for name, value in parameters.items()}


def use_of(row: tuple[Any, ...]) -> BudgetUse:
    """Return the content of a row of SELECT_USE."""
    spent, reserved = (Decimal(int(nanoneurons)).scaleb(-NEURON_DECIMALS) for nanoneurons in row)
    return BudgetUse(spent, reserved)
