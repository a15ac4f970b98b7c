"""Errors of the engine; generation/supervised_engine.py maps them onto the service's own errors."""

from llama2_server.configuration_error import ConfigurationError


class WeightsError(ConfigurationError):
    """The checkpoint cannot be served as it is; the message names the file or tensor and the remedy."""


class EngineError(Exception):
    """A broken invariant in the middle of a generation, such as logits that are not finite."""
