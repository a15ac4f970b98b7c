"""A fake model with scripted tokens, which tests the step loop and the service in milliseconds."""

import asyncio
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from llama2_server.engine.fingerprint.fingerprint import Fingerprint


def scripted_fingerprint(weights: str) -> Fingerprint:
    """Return the complete fingerprint of a scripted model."""
    fingerprint = Fingerprint({"kernels": "scripted"}, weights)
    fingerprint.set_weights(weights)
    return fingerprint


class ScriptedModel:
    """Replies to every prompt with the same token ids; can be stopped at a step, fail, and count its steps.

    A prompt equal to `probe_ids` is one of the server's probes, whose timing a test does not control. Probes are
    counted separately, and are stopped only by `gate(probes=True)`.
    """

    kernels = ""

    def __init__(
        self,
        reply_ids: Sequence[int],
        *,
        vocab_size: int,
        context_length: int = 1024,
        slots: int = 1,
        probe_ids: Sequence[int] = (),
        chunk_invariant: bool = False,
    ) -> None:
        self._probe_ids = list(probe_ids)
        self._probed = [False] * slots
        self.reply_ids = list(reply_ids)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.slots = slots
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.memory_bytes = 4 * context_length * slots
        self.prefill_chunk_tokens = 512
        self.chunk_invariant = chunk_invariant
        self.prompts: list[list[int]] = []
        self.probes = 0
        self.decoded_rows: list[int] = []
        self.failure: Exception | None = None
        self.nan_logits = False
        self.steps = threading.Semaphore(0)
        self.gated = False
        self._gates_probes = False
        self.completed_steps = 0
        self.in_step = threading.Event()
        self._produced = [0] * slots

    @property
    def prefills(self) -> int:
        """Return the number of prompts whose prefill has started."""
        return len(self.prompts)

    def prefill(self, slot: int, token_ids: list[int], position: int) -> Tensor:  # (vocab_size,)
        self._probed[slot] = token_ids == self._probe_ids
        self._wait(is_probe=self._probed[slot])
        if position == 0 and not self._probed[slot]:
            self.prompts.append(token_ids)
        self.probes += self._probed[slot]
        self._produced[slot] = 0
        return self._next_logits(slot)

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Tensor:  # (rows, vocab_size)
        self._wait(is_probe=all(self._probed[slot] for slot in slots))
        self.decoded_rows.append(len(slots))
        return torch.stack([self._next_logits(slot) for slot in slots])

    def gate(self, *, probes: bool = False) -> None:
        """Make each following step, also of probes if asked, wait for a permit from `allow`."""
        while self.steps.acquire(blocking=False):
            pass
        self.completed_steps = 0
        self._gates_probes = probes
        self.gated = True

    def allow(self, steps: int) -> None:
        """Permit this number of additional steps."""
        self.steps.release(steps)

    async def wait_until_blocked(self, steps: int) -> None:
        """Wait until the permitted `steps` are completed and the model waits before the next one."""
        while not (self.completed_steps >= steps and self.in_step.is_set()):
            await asyncio.sleep(0)

    def open_gate(self) -> None:
        """Let all following steps run without a permit."""
        self.gated = False
        self.steps.release(1)

    def _wait(self, *, is_probe: bool) -> None:
        if self.failure is not None:
            raise self.failure
        if self.gated and (self._gates_probes or not is_probe):
            self.in_step.set()
            self.steps.acquire()
            self.in_step.clear()
            self.completed_steps += 1

    def _next_logits(self, slot: int) -> Tensor:  # (vocab_size,)
        index = min(self._produced[slot], len(self.reply_ids) - 1)
        self._produced[slot] += 1
        logits = torch.full((self.vocab_size,), float("nan") if self.nan_logits else -1000.0)
        logits[self.reply_ids[index]] = 1000.0
        return logits
