"""Tests of the fused sampling kernels against the reference sampler; most blocks are large: the interpreter is slow."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tests.support.sampling.sampling_cases import compare_with
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama2_server.engine.cuda.sampling import NO_TOKEN, PenaltyState
from llama2_server.engine.cuda.step_runner import SamplingState
from llama2_server.engine.sampling import GenerationParams, Sampler

# A temperature near zero overflows on purpose, and logits that are not finite give weights that are not used.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN):RuntimeWarning")

CASES = 60
PADDING = (3, -1, 0.0, 0, 0.0, 1.0, 0.0, 0.0, 0.0)
DEFAULT = GenerationParams(1)
PARAMS = {
    "default": DEFAULT,
    "all tokens": GenerationParams(1, 1.0, 1.0),
    "top_k": GenerationParams(1, 1.0, 1.0, 3),
    "penalties": GenerationParams(1, 0.7, 0.9, 20, 0, 1.2, 0.4, 0.3),
}


@pytest.fixture
def kernels(device: torch.device) -> Any:
    """The module; imported late, because it needs Triton."""
    from llama2_server.engine.cuda.fused import sampling_kernels

    return sampling_kernels


def row(params: GenerationParams, slot: int, uniform: float) -> tuple[float, ...]:
    """Return a row of the step's table."""
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return (slot, 0, params.temperature, params.top_k, params.top_p, *penalties, uniform)


class Fused:
    """The fused sampler for some sequences, each in its own slot."""

    def __init__(self, kernels: Any, device: torch.device, rows: int, vocab_size: int) -> None:
        from llama2_server.engine.cuda.fused.launch import launch_options

        self._sampler = kernels.FusedSampler(rows, vocab_size, device, launch_options(device))
        last_ids, token_ids = (torch.full((count,), -7, device=device) for count in (rows + 1, rows))
        self.state = SamplingState(last_ids, token_ids, PenaltyState(rows, vocab_size, device))

    def sample(self, logits: Tensor, rows: Sequence[tuple[float, ...]], *, argmax_only: bool = False) -> list[int]:
        """Return the tokens of the rows."""
        table = torch.tensor(rows, dtype=torch.float64, device=logits.device)
        self._sampler(logits, table, self.state, argmax_only)
        return self.state.token_ids[: len(rows)].tolist()


class OneSequence:
    """The fused sampler for one sequence, as `compare_with` needs it."""

    def __init__(
        self, kernels: Any, device: torch.device, params: GenerationParams, prompt_ids: Sequence[int], vocab_size: int
    ) -> None:
        self._device = device
        self._fused = Fused(kernels, device, 1, vocab_size)
        self._fused.state.penalties.reset(0, list(prompt_ids))
        self._params = params

    def sample(self, logits: Tensor, uniform: float) -> int:
        """Return the token that the number selects, or NO_TOKEN."""
        return self._fused.sample(logits[None].to(self._device), [row(self._params, 0, uniform)])[0]


@pytest.fixture
def large_blocks(kernels: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, few and large blocks, and a search of few steps; a GPU has its real ones."""
    sizes = {"BLOCK_TOKENS": 512, "PART_TOKENS": 512, "WAYS": 128} if device.type == "cpu" else {}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.timeout(300)  # the interpreter on a busy machine
def test_tokens_equal_the_reference(kernels: Any, device: torch.device) -> None:
    """Random logits, parameters and numbers give the same token, except within 1e-12 of a boundary."""
    sizes = (100, 101, 128, 250, 600, 1000)
    found = compare_with(lambda *sequence: OneSequence(kernels, device, *sequence), CASES, 1, sizes)
    assert found.cases >= CASES
    assert found.different <= CASES / 20  # only the numbers that the test puts there are that close


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.timeout(300)  # the interpreter on a busy machine
def test_the_real_blocks_give_the_same_tokens(kernels: Any, device: torch.device, params: GenerationParams) -> None:
    """With the sizes that a GPU uses, and a last block that is not full."""
    vocab_size = 2 * kernels.BLOCK_TOKENS + 17
    logits = (torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 3).half().float()
    fused, reference = Fused(kernels, device, 1, vocab_size), Sampler(params, [1, 2], vocab_size, "cpu")
    fused.state.penalties.reset(0, [1, 2])
    for uniform in (0.0, 0.37, 1 - 2**-53):
        reference._uniform = partial(float, uniform)
        assert fused.sample(logits[None].to(device), [row(params, 0, uniform)]) == [reference.sample(logits)]


@pytest.mark.timeout(300)  # the interpreter on a busy machine
def test_the_vocabulary_of_llama_2(kernels: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """32,000 tokens: a small nucleus, one of nearly all tokens, all tokens by id, and the most likely token."""
    sizes = {"BLOCK_TOKENS": 2048, "PART_TOKENS": 512, "WAYS": 64} if device.type == "cpu" else {}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)
    logits = torch.randn(32_000, generator=torch.Generator().manual_seed(5)) * 2
    cases = (DEFAULT, GenerationParams(1, 5.0, 0.9999), GenerationParams(1, 1.0, 1.0, 1000), GenerationParams(1, 0.0))
    fused = Fused(kernels, device, len(cases), 32_000)
    found = fused.sample(
        logits.expand(len(cases), -1).contiguous().to(device),
        [row(params, slot, 0.61) for slot, params in enumerate(cases)],
    )
    for params, token in zip(cases, found, strict=True):
        reference = Sampler(params, [], 32_000, "cpu")
        reference._uniform = lambda: 0.61
        assert token == reference.sample(logits)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_share_a_step(kernels: Any, device: torch.device, bad: float) -> None:
    """A row whose logits are not finite has no token; padding changes no sequence, and each row its own state."""
    fused = Fused(kernels, device, 3, 600)
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)).to(device)
    likely = logits.argmax(dim=1).tolist()
    logits[1, 599] = bad
    rows = [row(GenerationParams(1, 1e-3), 2, 0.5), row(DEFAULT, 1, 0.5), row(GenerationParams(1, 0.0), 0, 0.5)]
    fused.state = SamplingState(
        torch.full((4,), -7, device=device), torch.zeros(4, dtype=torch.long, device=device), fused.state.penalties
    )
    fused._sampler = kernels.FusedSampler(4, 600, device, {"PDL": False})
    assert fused.sample(logits, [*rows, PADDING])[:3] == [likely[0], NO_TOKEN, likely[2]]
    assert fused.state.last_ids[:3].tolist() == [likely[2], 0, likely[0]]
    assert fused.state.penalties.counts[0].nonzero().flatten().tolist() == [likely[2]]
    assert fused.state.penalties.seen[2].nonzero().flatten().tolist() == [likely[0]]
    counts = fused.state.penalties.counts.clone()
    assert fused.sample(logits, [*rows, PADDING], argmax_only=True) == [likely[0], NO_TOKEN, *likely[2:]]
    assert torch.equal(fused.state.penalties.counts, counts)


@pytest.mark.usefixtures("large_blocks")
def test_equal_logits_are_taken_by_lower_id(kernels: Any, device: torch.device) -> None:
    """This holds for greedy tokens and for the order of the nucleus; 0 and -0 are equal."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0] * 20], device=device)
    fused = Fused(kernels, device, 1, 100)
    assert fused.sample(logits, [row(GenerationParams(1, 0.0), 0, 0.5)]) == [1]
    nucleus = [token for token in range(50) if token % 5]  # the first half of the 80 zeros
    for uniform in (0.0, 0.5, 0.99):
        found = fused.sample(logits, [row(GenerationParams(1, 1e-3, 0.5), 0, uniform)])
        assert found == [nucleus[int(uniform * len(nucleus))]]


@pytest.mark.usefixtures("large_blocks")
def test_a_token_without_a_weight_is_never_drawn(kernels: Any, device: torch.device) -> None:
    """Whether the candidates are in the order of their logits or of their ids, and at both ends of the range."""
    logits = torch.zeros(1, 600, device=device)
    logits[0, 11] = 1000.0
    fused = Fused(kernels, device, 1, 600)
    for top_p in (1.0, 1 - 2**-53):
        for uniform in (0.0, 1 - 2**-53):
            assert fused.sample(logits, [row(GenerationParams(1, 0.01, top_p), 0, uniform)]) == [11]


def test_a_vocabulary_beyond_the_codes_is_rejected(kernels: Any, device: torch.device) -> None:
    """The server then samples in torch."""
    with pytest.raises(ValueError, match="a vocabulary of 1048577 tokens is larger than 1048576"):
        kernels.FusedSampler(1, 2**20 + 1, device, {"PDL": False})


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of torch's operations that do more than select memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        name = func.overloadpacket.__name__
        if name not in ("view", "detach", "empty", "new_empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("argmax_only", [False, True])
def test_three_kernels_around_the_forward_pass(
    kernels: Any, device: torch.device, argmax_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One starts the step and two sample; torch computes nothing."""
    from llama2_server.engine.cuda.fused import embedding_kernels

    launched: list[str] = []

    def recorded(name: str) -> dict[tuple[int, ...], Callable[..., None]]:
        return defaultdict(lambda: lambda *_, **options: launched.append(name))

    for module, name in (
        (embedding_kernels, "_embedding_kernel"), (kernels, "_sort_kernel"), (kernels, "_draw_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, recorded(name))
    fused = Fused(kernels, device, 1, 100)
    table, logits, embedding = torch.zeros(1, 9, dtype=torch.float64), torch.zeros(1, 100), torch.zeros(100, 8)
    with Operations() as operations:
        embedding_kernels.embed(table, fused.state.last_ids, embedding, {"PDL": False})
        fused._sampler(logits, table, fused.state, argmax_only)
    assert launched == ["_embedding_kernel", "_sort_kernel", "_draw_kernel"]
    assert operations.names == []
