"""Errors of the engine; generation/supervised_engine.py maps them to the service's errors."""

from llama2_server.configuration_error import ConfigurationError


class WeightsError(ConfigurationError):
    """The checkpoint cannot be served; the message names the file or tensor, the problem and how to fix it."""


class EngineError(Exception):
    """A broken invariant during a generation."""


class SequenceError(EngineError):
    """An error of one sequence: another one can succeed on the same device."""


class OutOfMemory(SequenceError):
    """The device has too little free memory for the sequence."""


class NonFiniteLogits(SequenceError):
    """The model computed logits that are not finite."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite")
