"""Errors of the usage ledger, in addition to UsageJournalFull and UsageUnavailable of the service's error tree."""

from llama2_server.configuration_error import ConfigurationError


class LedgerError(ConfigurationError):
    """The ledger cannot be opened with the current settings; the message is one line without passwords."""


class StoreUnavailable(Exception):
    """An operation on the usage store failed; `temporary` is True only if the cause is certainly temporary."""

    def __init__(self, reason: str, *, temporary: bool) -> None:
        super().__init__(reason)
        self.temporary = temporary
