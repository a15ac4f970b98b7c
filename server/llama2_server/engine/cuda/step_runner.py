"""A complete step on the device: forward pass, sampling, and the tokens as the next step's input.

The host selects the rows and draws their random numbers. It reads the tokens one step later, so the device never waits
for it. The whole step is one CUDA graph per batch size; without graphs the same code runs eagerly.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2_server.engine.cuda.sampling import (
    NO_TOKEN,
    BatchSamplingParams,
    PenaltyState,
    greedy,
    has_penalties,
    is_argmax,
    sample,
)
from llama2_server.engine.errors import NonFiniteLogits
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.step_runner import StepKind

ForwardFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps token ids, slots and positions, each (rows,), to float32 logits (rows, vocab_size); see cuda/forward.py."""

# The columns of the table that the host uploads for each step; float64 holds each value exactly.
SLOT, POSITION, TEMPERATURE, TOP_K, TOP_P, REPETITION, FREQUENCY, PRESENCE, UNIFORM = range(COLUMNS := 9)
PADDING_POSITION = -1.0


@dataclass(frozen=True, slots=True)
class SamplingState:
    """The results of sampling on the device, for the next step and for the host."""

    last_ids: Tensor  # (slots + 1,), the last token of each slot; one additional slot is for padding rows
    token_ids: Tensor  # (rows,), the tokens of a step
    penalties: PenaltyState


class StepKernels:
    """How a step is computed: the forward pass from `forward`, and all else in torch; see also `fused/step.py`."""

    def __init__(self, forward: ForwardFunction) -> None:
        self.forward = forward

    def logits(self, table: Tensor, last_ids: Tensor) -> Tensor:  # (rows, COLUMNS), (slots + 1,) -> (rows, vocab_size)
        """Append each row's last token to its slot and return the logits after it."""
        slots, positions = table[:, SLOT].long(), table[:, POSITION].long()
        return self.forward(last_ids[slots], slots, positions)

    def sample(self, logits: Tensor, table: Tensor, state: SamplingState, argmax_only: bool) -> None:
        """Sample one token per row of the logits, (rows, vocab_size), and store it in the state."""
        rows = logits.shape[0]
        slots = table[:, SLOT].long()
        if argmax_only:
            token_ids = greedy(logits)
        else:
            params = BatchSamplingParams(*(table[:, column : column + 1] for column in range(TEMPERATURE, COLUMNS)))
            token_ids = sample(state.penalties.apply_penalties(logits, slots, params), params)
        state.token_ids[:rows] = token_ids
        token_ids = token_ids.clamp(min=0)  # a row without a token ends, but its next step may be in progress
        state.last_ids[slots] = token_ids
        if not argmax_only:
            state.penalties.add_tokens(slots, token_ids)


class _HostBuffers:
    """Input and output of one step on the host, in pinned memory, which the device accesses directly."""

    def __init__(self, rows: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.table = torch.empty(rows, COLUMNS, dtype=torch.float64, pin_memory=on_cuda)
        self.token_ids = torch.empty(rows, dtype=torch.long, pin_memory=on_cuda)
        # A blocking event, because any other keeps a core busy until the device has copied the tokens.
        self._copied = torch.cuda.Event(blocking=True) if on_cuda else None  # type: ignore[no-untyped-call]

    def fetch(self, token_ids: Tensor) -> None:  # (rows,)
        """Start to copy the tokens to the host."""
        self.token_ids[: token_ids.shape[0]].copy_(token_ids, non_blocking=True)
        if self._copied:
            self._copied.record()

    def read(self, rows: int) -> list[int]:
        """Wait for the copy and return the tokens of the first rows."""
        if self._copied:
            self._copied.synchronize()
        found: list[int] = self.token_ids[:rows].tolist()
        return found


class CudaStepRunner:
    """A step runner that samples on the device; `capture_graphs` records its steps as CUDA graphs."""

    kind = StepKind.CUDA_GRAPHS
    lookahead = 1

    def __init__(self, model: LlamaModel, kernels: StepKernels, kernel_choices: dict[str, str] | None = None) -> None:
        self.kernel_choices = kernel_choices or {}
        self._model = model
        self._kernels = kernels
        self._uniforms: list[Callable[[], float]] = [random.random] * model.slots
        self._batch_sizes = batch_sizes(model.slots)
        self._table = torch.zeros(self._batch_sizes[-1], COLUMNS, dtype=torch.float64, device=model.device)
        self._state = sampling_state(model)
        # Buffers of steps whose tokens have been read. Nothing else may be written: the device may still read a table,
        # and the tokens of an earlier step may be unread when a later step raises.
        self._read_buffers: list[_HostBuffers] = []
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture_graphs(self) -> int:
        """Record a CUDA graph for each batch size and kind of sampling, and return their number."""
        pool = None
        for size, argmax_only in itertools.product(reversed(self._batch_sizes), (False, True)):
            self._upload([], size)
            self._step(size, argmax_only)  # warm up: lazy initialization is not allowed during capture
            torch.cuda.synchronize(self._model.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(size, argmax_only)
            pool = graph.pool()
            self._graphs[size, argmax_only] = graph
        return len(self._graphs)

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """Append a part of the prompt and, after the last part, sample the first token."""
        logits = self._model.prefill(sequence.slot, chunk, sequence.position)  # (vocab_size,)
        if sequence.position + len(chunk) < len(sequence.prompt_ids):
            return ()
        # Python's generator, as in HostStepRunner: drawing needs no device synchronization.
        self._uniforms[sequence.slot] = random.Random(sequence.params.seed).random  # noqa: S311 - no secret
        if has_penalties(sequence.params):
            self._state.penalties.reset(sequence.slot, sequence.prompt_ids)
        buffers = self._upload([sequence], 1)
        self._sample(logits[None], is_argmax(sequence.params))
        return self._fetch(buffers, 1)

    @torch.inference_mode()
    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """Append each row's last token and sample the next one."""
        size = next(size for size in self._batch_sizes if size >= len(rows))
        argmax_only = all(is_argmax(sequence.params) for sequence in rows)
        buffers = self._upload(rows, size)
        graph = self._graphs.get((size, argmax_only))
        if graph:
            graph.replay()
        else:
            self._step(size, argmax_only)
        return self._fetch(buffers, len(rows))

    def _fetch(self, buffers: _HostBuffers, rows: int) -> Iterator[TokenOrError]:
        """Start to copy the tokens of the first rows to the host; reading the first one waits for the copy."""
        buffers.fetch(self._state.token_ids[:rows])
        return self._read(buffers, rows)

    def _read(self, buffers: _HostBuffers, rows: int) -> Iterator[TokenOrError]:
        token_ids = buffers.read(rows)
        self._read_buffers.append(buffers)
        for token_id in token_ids:
            yield NonFiniteLogits() if token_id == NO_TOKEN else token_id

    def _upload(self, rows: SequenceOf[Sequence], size: int) -> _HostBuffers:
        padding = [0.0] * COLUMNS
        padding[SLOT], padding[POSITION], padding[REPETITION] = self._model.slots, PADDING_POSITION, 1.0
        table = [*map(self._row, rows), *[padding] * (size - len(rows))]
        buffers = (
            self._read_buffers.pop() if self._read_buffers else _HostBuffers(self._batch_sizes[-1], self._model.device)
        )
        buffers.table[:size] = torch.tensor(table, dtype=torch.float64)
        self._table[:size].copy_(buffers.table[:size], non_blocking=True)
        return buffers

    def _row(self, sequence: Sequence) -> list[float]:
        params = sequence.params
        uniform = 0.0 if params.temperature == 0 else self._uniforms[sequence.slot]()
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        sampling = (params.temperature, params.top_k, params.top_p)
        return [sequence.slot, sequence.position, *sampling, *penalties, uniform]

    def _step(self, size: int, argmax_only: bool) -> None:
        self._sample(self._kernels.logits(self._table[:size], self._state.last_ids), argmax_only)

    def _sample(self, logits: Tensor, argmax_only: bool) -> None:  # (rows, vocab_size)
        self._kernels.sample(logits, self._table[: logits.shape[0]], self._state, argmax_only)


def sampling_state(model: LlamaModel) -> SamplingState:
    """Return the state of a model whose slots are empty."""
    last_ids, token_ids = (
        torch.zeros(count, dtype=torch.long, device=model.device)
        for count in (model.slots + 1, batch_sizes(model.slots)[-1])
    )
    return SamplingState(last_ids, token_ids, PenaltyState(model.slots, model.vocab_size, model.device))


def batch_sizes(slots: int) -> list[int]:
    """Return the batch sizes of the steps: powers of two, up to the first that holds all slots."""
    return [2**power for power in range((slots - 1).bit_length() + 1)]
