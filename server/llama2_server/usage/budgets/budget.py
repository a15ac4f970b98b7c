"""The neuron budget of an account in one calendar month in UTC, and the price that a request reserves in it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

BudgetOf = Callable[[str], Decimal | None]
"""Returns the current budget of an account in neurons per month; None without one."""


@dataclass(frozen=True, slots=True)
class Month:
    """A calendar month in UTC."""

    first_day: date

    @classmethod
    def of(cls, time: datetime) -> "Month":
        """Return the month of an aware time."""
        return cls(time.astimezone(UTC).date().replace(day=1))

    @property
    def next_first_day(self) -> date:
        """The first day of the next month."""
        return (self.first_day + timedelta(days=31)).replace(day=1)

    def seconds_left(self, now: datetime) -> float:
        """Return the time until the next month starts."""
        next_start = datetime.combine(self.next_first_day, datetime.min.time(), UTC)
        return max(0.0, (next_start - now).total_seconds())


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """The neurons of a month that are not available to a new request."""

    spent: Decimal
    """Neurons of the stored records."""
    reserved: Decimal
    """Highest price of the requests that have no stored record yet."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """The state of an account's budget."""

    neurons_per_month: Decimal
    use: BudgetUse
    resets_in_seconds: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """The highest price of one request, and the budget in which it is reserved."""

    request_id: str
    account_id: str
    started_at: datetime
    neurons: Decimal
    budget: Decimal

    @property
    def day(self) -> date:
        """The day in UTC on which the request's record will count."""
        return self.started_at.astimezone(UTC).date()

    @property
    def month(self) -> Month:
        """The month of the budget."""
        return Month.of(self.started_at)

    def fits(self, use: BudgetUse) -> bool:
        """Return whether spent and reserved neurons, this reservation included, stay within the budget."""
        return use.spent + use.reserved + self.neurons <= self.budget
