"""The name of everything that decides the text of a reply to a request with a seed."""

import hashlib
import json
from collections.abc import Mapping

WEIGHTS = "weights"
"""The input that is the digest of the weights' files."""


class Fingerprint:
    """The inputs that decide a text, and their digest.

    Servers with equal values give equal texts for equal requests with equal seeds. The digest of the weights takes
    minutes for large weights, so another thread sets it later.
    """

    def __init__(self, inputs: Mapping[str, str], quick_weights: str, *, depends_on_neighbors: bool = False) -> None:
        """Name all inputs except the weights.

        Args:
            inputs: each input by its name.
            quick_weights: a digest of a part of the weights, which is known at once.
            depends_on_neighbors: whether a reply can depend on the requests that run at the same time. There is no
                fingerprint then.
        """
        self.depends_on_neighbors = depends_on_neighbors
        self.is_pending = False
        """Whether the weights are being hashed, so that a missing value will soon be known."""
        self._inputs = dict(inputs)
        self._quick = _digest({**inputs, "quick weights": quick_weights})
        self._value: str | None = None

    @property
    def value(self) -> str | None:
        """The fingerprint, 64 hexadecimal digits; None until the weights are hashed, or if there is none."""
        return self._value

    @property
    def inputs(self) -> dict[str, str]:
        """The known inputs by name."""
        return dict(self._inputs)

    @property
    def cache_identity(self) -> str:
        """Identifies the model and its kernels in the keys of the response cache, also without a fingerprint."""
        return self._value or self._quick

    def set_weights(self, digest: str) -> None:
        """Add the digest of the weights' files; can be called on any thread."""
        self._inputs = {**self._inputs, WEIGHTS: digest}
        if not self.depends_on_neighbors:
            self._value = _digest(self._inputs)


def _digest(inputs: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
