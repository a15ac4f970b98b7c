"""What can go wrong below the step loop. The seam above maps these onto the service's own errors."""


class EngineError(Exception):
    """The engine cannot do what it was asked; the message is one line for the operator."""


class WeightsError(EngineError):
    """The checkpoint cannot be served as it is; the message names the file or tensor and the remedy."""


class EngineFault(EngineError):
    """A broken invariant in the middle of a generation, such as logits that are not finite."""
