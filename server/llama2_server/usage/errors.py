"""Errors of the usage ledger, in addition to UsageUnavailable of the service's error tree."""

from llama2_server.configuration_error import ConfigurationError


class LedgerError(ConfigurationError):
    """The ledger cannot be opened with the current settings; the message is one line without passwords."""


class NewerSchema(Exception):
    """A newer version of this service has migrated the database."""


class StoreUnavailable(Exception):
    """An operation on the usage store failed; `temporary` is True only if the cause is certainly temporary."""

    def __init__(self, reason: str, *, temporary: bool, sqlstate: str = "") -> None:
        super().__init__(reason)
        self.temporary = temporary
        self.uncertain = False
        """Whether the operation may have taken effect in spite of the error; only `Store.reserve` sets it."""
        self.sqlstate = sqlstate
        """PostgreSQL's code of the error; empty for an error without one."""

    @property
    def is_of_the_data(self) -> bool:
        """Whether the store rejected the values (class 22) or a constraint did (class 23)."""
        return self.sqlstate.startswith(("22", "23"))
