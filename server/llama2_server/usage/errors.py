"""What the ledger raises, besides UsageJournalFull and UsageUnavailable of the service's error tree."""

from llama2_server.configuration_error import ConfigurationError


class LedgerError(ConfigurationError):
    """The ledger cannot be opened as it is configured; the message is one line for the operator, without passwords."""


class StoreUnavailable(Exception):
    """The store did not do what it was asked; `temporary` where the reason is sure to be of the moment."""

    def __init__(self, reason: str, *, temporary: bool) -> None:
        super().__init__(reason)
        self.temporary = temporary
