"""What the ledger raises, besides LedgerFull of the service's error tree."""

from llama2_server.errors import Unavailable


class LedgerError(Exception):
    """The ledger cannot be opened as it is configured; the message is one line for the operator, without passwords."""


class StoreDown(Exception):
    """The store did not do what it was asked; `temporary` where the reason is sure to be of the moment."""

    def __init__(self, reason: str, *, temporary: bool) -> None:
        super().__init__(reason)
        self.temporary = temporary


class LedgerDown(Unavailable):
    """The ledger's store does not answer, so that usage cannot be read now."""

    reason = "LEDGER_DOWN"

    def __init__(self) -> None:
        super().__init__("usage cannot be read now; try again")
