"""Errors of the engine; generation/supervised_engine.py maps them to the service's errors."""

from llama2_server.configuration_error import ConfigurationError


class WeightsError(ConfigurationError):
    """The checkpoint cannot be served; the message names the file or tensor, the problem and how to fix it."""


class EngineError(Exception):
    """A broken invariant during a generation, such as logits that are not finite."""
