"""What hinders telemetry from starting."""

from llama2_server.configuration_error import ConfigurationError


class TelemetryError(ConfigurationError):
    """Metrics or traces cannot be had as they are configured; the message is one line for the operator."""
