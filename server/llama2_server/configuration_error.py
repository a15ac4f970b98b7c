"""The base of every error that the operator must fix in the configuration; this module imports nothing."""


class ConfigurationError(Exception):
    """The server cannot start as it is configured; each line of the message says what is wrong and how to fix it."""
