"""The base of every error that the operator must fix in the configuration; this module imports nothing."""


class ConfigurationError(Exception):
    """The server cannot start with this configuration; each line of the message names an error and its fix."""
