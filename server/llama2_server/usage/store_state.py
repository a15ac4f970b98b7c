"""Whether the usage store answers."""

import logging

logger = logging.getLogger(__name__)


class StoreState:
    """The outcome of the last operation on the store; each change is logged once."""

    def __init__(self) -> None:
        self.up = True
        """Whether the last operation succeeded."""

    def record_failure(self, error: Exception) -> None:
        """Record that an operation failed."""
        if self.up:
            reason = str(error) or type(error).__name__
            logger.warning("the usage store is unavailable, records wait on this server's disk: %s", reason)
        self.up = False

    def record_success(self) -> None:
        """Record that an operation succeeded."""
        if not self.up:
            logger.warning("the usage store is available again")
        self.up = True
