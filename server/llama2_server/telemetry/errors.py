"""Errors raised while telemetry starts."""

from llama2_server.configuration_error import ConfigurationError


class TelemetryError(ConfigurationError):
    """The settings of metrics or traces do not work; the message is one line for the operator."""
