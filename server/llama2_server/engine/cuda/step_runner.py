"""A step on the device from end to end: forward pass, sampling, and the tokens as the next step's input.

The host says which rows take part and draws their random numbers; it reads the tokens one step later, and so never
keeps the device waiting. The whole step is one CUDA graph for each number of rows; without graphs the same code runs as
it is.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from llama2_server.engine.cuda.sampling import (
    NO_TOKEN,
    PenaltyState,
    RowParams,
    draw,
    greedy,
    is_penalised,
    is_plain,
)
from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.sequence import Sequence
from llama2_server.engine.step_runner import TokenOrError

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Token ids, slots and positions, each (rows,), to float32 logits (rows, vocab_size); see cuda/forward.py."""

# What the host tells about a row, in this order, as float64, which holds each of them exactly.
SLOT, POSITION, TEMPERATURE, TOP_K, TOP_P, REPETITION, FREQUENCY, PRESENCE, UNIFORM = range(COLUMNS := 9)
FILLER_POSITION = -1.0


class _HostBuffers:
    """What goes to the device for one step and what comes back, in memory that the device can reach by itself."""

    def __init__(self, rows: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.table = torch.empty(rows, COLUMNS, dtype=torch.float64, pin_memory=on_cuda)
        self.token_ids = torch.empty(rows, dtype=torch.long, pin_memory=on_cuda)
        self._done = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def fetch(self, token_ids: Tensor) -> Iterator[TokenOrError]:  # (rows,)
        """Begin to bring the tokens back; reading the first one waits until they are there."""
        self.token_ids[: token_ids.shape[0]].copy_(token_ids, non_blocking=True)
        if self._done:
            self._done.record()
        return self._read(token_ids.shape[0])

    def _read(self, rows: int) -> Iterator[TokenOrError]:
        if self._done:
            self._done.synchronize()
        for token_id in self.token_ids[:rows].tolist():
            yield EngineError("the model's logits are not finite") if token_id == NO_TOKEN else token_id


class CudaStepRunner:
    """Steps of a model that sample on its device; `capture` makes graphs of them."""

    lookahead = 1

    def __init__(self, model: LlamaModel, forward: Forward) -> None:
        self._model = model
        self._forward = forward
        # One place more than there are slots, for rows that only fill up a step.
        self._last_ids = torch.zeros(model.slots + 1, dtype=torch.long, device=model.device)
        self._seen = PenaltyState(model.slots, model.vocab_size, model.device)
        self._uniforms: list[Callable[[], float]] = [random.random] * model.slots
        self._sizes = _sizes(model.slots)
        self._table = torch.zeros(self._sizes[-1], COLUMNS, dtype=torch.float64, device=model.device)
        self._token_ids = torch.zeros(self._sizes[-1], dtype=torch.long, device=model.device)
        # One is written while the device still works with the other.
        self._exchanges = itertools.cycle(
            _HostBuffers(self._sizes[-1], model.device) for _ in range(self.lookahead + 1)
        )
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self) -> int:
        """Record a graph for each number of rows and way of sampling; how many they are."""
        pool = None
        for size, plain in itertools.product(reversed(self._sizes), (False, True)):
            self._send([], size)
            self._step(size, plain)  # whatever is made at the first use must not be made while recording
            torch.cuda.synchronize(self._model.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(size, plain)
            pool = graph.pool()
            self._graphs[size, plain] = graph
        return len(self._graphs)

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """As in Steps."""
        logits = self._model.prefill(sequence.slot, chunk, sequence.position)  # (vocab_size,)
        if sequence.position + len(chunk) < len(sequence.prompt_ids):
            return ()
        # Python's generator, as on the host: a draw needs nothing from the device.
        self._uniforms[sequence.slot] = random.Random(sequence.params.seed).random  # noqa: S311 - no secret
        if is_penalised(sequence.params):
            self._seen.begin(sequence.slot, sequence.prompt_ids)
        exchange = self._send([sequence], 1)
        self._choose(logits[None], is_plain(sequence.params))
        return exchange.fetch(self._token_ids[:1])

    @torch.inference_mode()
    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """As in Steps."""
        size = next(size for size in self._sizes if size >= len(rows))
        plain = all(is_plain(sequence.params) for sequence in rows)
        exchange = self._send(rows, size)
        graph = self._graphs.get((size, plain))
        if graph:
            graph.replay()
        else:
            self._step(size, plain)
        return exchange.fetch(self._token_ids[: len(rows)])

    def _send(self, rows: SequenceOf[Sequence], size: int) -> _HostBuffers:
        filler = [0.0] * COLUMNS
        filler[SLOT], filler[POSITION], filler[REPETITION] = self._model.slots, FILLER_POSITION, 1.0
        lines = [*map(self._line, rows), *[filler] * (size - len(rows))]
        exchange = next(self._exchanges)
        exchange.table[:size] = torch.tensor(lines, dtype=torch.float64)
        self._table[:size].copy_(exchange.table[:size], non_blocking=True)
        return exchange

    def _line(self, sequence: Sequence) -> list[float]:
        params = sequence.params
        uniform = 0.0 if params.temperature == 0 else self._uniforms[sequence.slot]()
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        drawing = (params.temperature, params.top_k, params.top_p)
        return [sequence.slot, sequence.position, *drawing, *penalties, uniform]

    def _step(self, size: int, plain: bool) -> None:
        slots, positions = self._table[:size, SLOT].long(), self._table[:size, POSITION].long()
        self._choose(self._forward(self._last_ids[slots], slots, positions), plain)

    def _choose(self, logits: Tensor, plain: bool) -> None:  # (rows, vocab_size)
        rows = logits.shape[0]
        table = self._table[:rows]
        slots = table[:, SLOT].long()
        if plain:
            token_ids = greedy(logits)
        else:
            params = RowParams(*(table[:, column : column + 1] for column in range(TEMPERATURE, COLUMNS)))
            token_ids = draw(self._seen.penalised(logits, slots, params), params)
        self._token_ids[:rows] = token_ids
        token_ids = token_ids.clamp(min=0)  # a row without a token ends, but its next step may be under way
        self._last_ids[slots] = token_ids
        if not plain:
            self._seen.add(slots, token_ids)


def _sizes(slots: int) -> list[int]:
    """The numbers of rows that steps are made for: powers of two, the last of them for all slots."""
    return [2**power for power in range((slots - 1).bit_length() + 1)]
