"""What hinders telemetry from starting."""


class TelemetryError(Exception):
    """Metrics or traces cannot be had as they are configured; the message is one line for the operator."""
