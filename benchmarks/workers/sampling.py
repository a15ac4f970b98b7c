"""The default request's sampling, for libraries that return logits."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.workers.protocol import TEMPERATURE, TOP_P

CANDIDATES = 256


class NucleusSampler:
    """Draws from the most likely tokens whose probabilities at TEMPERATURE sum to TOP_P; greedy without a seed."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else np.random.default_rng(seed)

    def sample(self, logits: NDArray[np.float32]) -> int:  # (vocab_size,)
        """Return the next token."""
        if self._random is None:
            return int(np.argmax(logits))
        weights = np.exp((logits - logits.max()) / TEMPERATURE)
        limit = TOP_P * weights.sum()
        # Most nuclei are small: sort the largest weights only, and all of them if these are not enough.
        order = (
            np.argpartition(weights, -CANDIDATES)[-CANDIDATES:]
            if len(weights) > CANDIDATES
            else np.arange(len(weights))
        )
        if weights[order].sum() < limit:
            order = np.arange(len(weights))
        order = order[np.argsort(-weights[order])]
        sums = np.cumsum(weights[order])
        nucleus = int(np.searchsorted(sums, limit)) + 1
        drawn = self._random.random() * sums[min(nucleus, len(sums)) - 1]
        return int(order[min(int(np.searchsorted(sums, drawn, side="right")), len(sums) - 1)])
