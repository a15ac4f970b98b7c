"""The cost of a step by its number of rows, measured while the engine runs."""

FIRST_ROW_COST = 0.1  # of each additional row, as a share of a step with one row, before it is measured
FIRST_ROW_WEIGHT = 3.0  # of that share next to the measurements: as much as three steps with one additional row
DECAY = 0.995  # of the weight of each measurement per later step; after 140 steps it counts half
MAX_SURPRISE = 3.0  # a step that lost its core for a while counts as this many times the expected time


class RowCosts:
    """A line through the durations of the last steps: the time of one row, and the share of each additional row.

    The share is a weighted mean of its first value and the measurements. Without new measurements the first value gains
    weight again, so that an unusual measurement does not decide forever.
    """

    def __init__(self) -> None:
        self._one_row_seconds: float | None = None
        self._products = 0.0  # sum of rows * costs, of the additional rows and of their measured costs
        self._squares = 0.0  # sum of rows * rows

    def observe(self, rows: int, seconds: float) -> None:
        """Learn the duration of a step."""
        if self._one_row_seconds is None:
            self._one_row_seconds = seconds / self.relative(rows)
            return
        expected = self._one_row_seconds * self.relative(rows)
        seconds = min(seconds, MAX_SURPRISE * expected)
        additional = rows - 1
        self._products = DECAY * self._products + additional * (seconds / self._one_row_seconds - 1)
        self._squares = DECAY * self._squares + additional * additional
        # A step with many rows says little about one row.
        self._one_row_seconds *= 1 + 0.1 / rows * (seconds / expected - 1)

    def relative(self, rows: int) -> float:
        """Return the expected time of a step, divided by the time of a step with one row."""
        return 1 + self._row_cost * (rows - 1)

    def rows_within(self, seconds: float) -> int:
        """Return the largest number of rows that a step is expected to compute in this time; 0 if unknown."""
        if self._one_row_seconds is None:
            return 0
        return max(0, 1 + int((seconds / self._one_row_seconds - 1) / self._row_cost))

    @property
    def _row_cost(self) -> float:
        first = FIRST_ROW_WEIGHT * FIRST_ROW_COST
        return max(0.01, (first + self._products) / (FIRST_ROW_WEIGHT + self._squares))
