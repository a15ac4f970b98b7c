"""Tests of the choice of the step runner, of autotuning, and of the verification of the logits."""

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.cuda import build
from llama2_server.engine.cuda.build import GpuKernels, build_step_runner
from llama2_server.engine.cuda.verification import verify_logits
from llama2_server.engine.errors import EngineError, OutOfMemory, WeightsError
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def model(checkpoint: MakeCheckpoint) -> LlamaModel:
    return load_model(
        checkpoint(heads=4, kv_heads=2),
        device="cpu",
        dtype=torch.float32,
        context_length=128,
        slots=3,
        cpu_kernels="torch",
    )


def on_fake_gpu(model: LlamaModel, prefill: Callable[..., object] = lambda *_: None) -> Any:
    """Return a stand-in for the model that claims to be on a GPU."""
    names = ("slots", "config", "weights", "vocab_size", "context_length")
    parts = {name: getattr(model, name) for name in names}
    return SimpleNamespace(device=torch.device("cuda"), prefill=prefill, prefill_chunk_tokens=50, **parts)


@pytest.mark.parametrize("kernels", ["torch", "fused", "auto"])
def test_a_prompt_of_the_full_context_is_prefilled_before_serving(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, kernels: GpuKernels
) -> None:
    """The start computes each chunk of the longest prompt, with custom kernels and without."""
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr(build, "_build_cuda_step_runner", lambda *_, **options: HostStepRunner(model))
    chunks: list[tuple[int, int, int]] = []

    def prefill(slot: int, token_ids: list[int], position: int) -> None:
        chunks.append((slot, position, len(token_ids)))

    build_step_runner(on_fake_gpu(model, prefill), kernels=kernels, cache_directory=None)
    assert chunks == [(0, 0, 50), (0, 50, 50), (0, 100, 28)]


def test_a_card_too_small_for_a_long_prompt_is_rejected(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line with the remedy; the server does not start and fail later."""

    def prefill(slot: int, token_ids: list[int], position: int) -> None:
        if position == 100:
            raise OutOfMemory("out of memory in a prefill of 28 tokens: no")

    monkeypatch.setattr(build, "_build_cuda_step_runner", lambda *_, **options: HostStepRunner(model))
    expected = r"a prompt of 128 tokens does not fit on cuda next to .* 28 tokens: no; free memory, or lower context"
    with pytest.raises(WeightsError, match=expected):
        build_step_runner(on_fake_gpu(model, prefill), kernels="auto", cache_directory=None)


def test_a_model_on_the_cpu_is_sampled_on_the_host(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """The runner is HostStepRunner, and nothing is logged."""
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(model, kernels="auto", cache_directory=None), HostStepRunner)
    assert not caplog.records


def test_plain_torch_replaces_kernels_that_cannot_be_built(
    model: LlamaModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the compiler or the driver raises an error, the model runs in torch, and one log record gives the reason."""
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    if torch.cuda.is_available():
        monkeypatch.setattr("torch.cuda.get_device_name", _fail)
    with caplog.at_level(logging.INFO):
        assert isinstance(
            build_step_runner(on_fake_gpu(model), kernels="auto", cache_directory=tmp_path), HostStepRunner
        )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("running in plain torch, which is slower: ")


def _fail(*_: object) -> str:
    raise RuntimeError("no")


def test_gpu_kernels_torch_does_not_touch_the_device(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """The model runs in torch at once, and the log states that it is slower."""
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(on_fake_gpu(model), kernels="torch", cache_directory=None), HostStepRunner)
    assert "running in plain torch, which is slower: --gpu-kernels is torch" in caplog.text


@pytest.mark.parametrize("unwritten", [0.0, float("nan")])
def test_verification_rejects_a_wrong_step(model: LlamaModel, unwritten: float) -> None:
    """The model's own step has no error; a step that mixes up slots or omits a token is rejected.

    This holds for any content of memory that the step reads by mistake: a NaN error is not a small error.
    """

    def correct(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return model.decode(slots.tolist(), token_ids.tolist(), positions.tolist())

    def mixed_up_slots(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return correct(token_ids, slots.roll(1), positions)

    def omitted_token(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return correct(token_ids, slots, positions - 1)

    with torch.inference_mode():
        for tensor in (*model.kv_cache.keys, *model.kv_cache.values):
            tensor.fill_(unwritten)
    assert verify_logits(model, correct) == 0
    for wrong in (mixed_up_slots, omitted_token):
        with pytest.raises(EngineError, match="differ"):
            verify_logits(model, wrong)


@pytest.fixture
def autotuning(device: torch.device) -> Any:
    """The autotune module; imported late, because it needs Triton."""
    from llama2_server.engine.cuda import autotune

    return autotune


def test_the_fastest_correct_variant_is_selected(
    autotuning: Any, model: LlamaModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The fastest variant is selected; variants with wrong results are rejected and logged."""
    workloads = dict(autotuning.matmul_workloads(model))
    name, workload = list(workloads.items())[1]  # the smallest matmul, because the interpreter is slow
    timers = iter([[0.3], [0.2], [0.1], *[[0.4]] * (len(autotuning.VARIANTS) - 3)])
    assert autotuning.fastest_variant(workload, 1e-5, name, timer_of(timers)) == autotuning.VARIANTS[2]

    def wrong_in_custom_kernels(matmul: Any) -> Tensor:
        result: Tensor = workload(matmul)
        return result if matmul.variants.get(name) is None else result * 1.1

    assert autotuning.fastest_variant(wrong_in_custom_kernels, 1e-5, name, timer_of(iter([[1.0]]))) is None
    assert caplog.text.count("has a relative error of 0.100") == len(autotuning.VARIANTS) - 1


def timer_of(seconds: Iterator[list[float]]) -> Callable[[Callable[[], Tensor]], Callable[[], float]]:
    """Return a made timer: each variant has a list of the seconds of its rounds, which repeats."""
    return lambda run: itertools.cycle(next(seconds)).__next__


def test_variants_take_turns_and_the_minimum_counts(autotuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose clock rises during the measurement does not favor the last variant."""
    monkeypatch.setattr(autotuning, "_correct_variants", lambda *_: ((index, lambda: None) for index in range(3)))
    measured: list[int] = []
    clock, variants = itertools.count(1), itertools.count()

    def timer(run: object) -> Callable[[], float]:
        variant = next(variants)

        def measure() -> float:
            measured.append(variant)
            return (1.0 if variant == 1 else 1.5) / next(clock)

        return measure

    rounds = autotuning.ROUNDS
    clocks = [1.5 / (1 + 3 * (rounds - 1)), 1.0 / (2 + 3 * (rounds - 1)), 1.5 / (3 + 3 * (rounds - 1))]
    assert autotuning.fastest_variant(None, 1e-5, "name", timer) == clocks.index(min(clocks)) == 1
    assert measured == [0, 1, 2] * rounds


def test_every_matmul_of_a_step_is_autotuned(autotuning: Any, model: LlamaModel) -> None:
    """Autotuning uses the same names as the step; a name that differs would silently fall back to torch."""
    from llama2_server.engine.cuda.forward import CudaForward
    from llama2_server.engine.cuda.matmul import Matmul

    requested: set[str] = set()

    class RecordingDict(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            requested.add(name)
            return default

    matmul = Matmul(1e-5)
    matmul.variants = RecordingDict()
    numbers = torch.tensor([0])
    CudaForward(model, matmul)(numbers, numbers, numbers)
    assert requested == dict(autotuning.matmul_workloads(model)).keys()


def test_variants_are_cached_for_the_same_device_and_software(
    autotuning: Any, model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start measures nothing.

    After a change of device, driver, version or kernel source, or with a broken file, the variants are measured again.
    """
    measured: list[str] = []

    def fastest_variant(workload: object, epsilon: float, name: str) -> Any:
        measured.append(name)
        return autotuning.VARIANTS[len(measured) % 2]

    monkeypatch.setattr(autotuning, "fastest_variant", fastest_variant)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(autotuning, "driver_versions", lambda: "1, a module")
    file = tmp_path / "there" / "variants.json"
    first = autotuning.autotune(model, file)
    assert list(first) == measured
    assert autotuning.autotune(model, file) == first
    assert list(first) == measured
    file.write_text(file.read_text().replace("4", "four", 1))
    autotuning.autotune(model, file)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "another GPU")
    autotuning.autotune(model, file)
    file.write_text("{")
    autotuning.autotune(model, file)
    monkeypatch.setattr(autotuning, "driver_versions", lambda: "2, a module")
    autotuning.autotune(model, file)
    (tmp_path / "kernels.py").write_text("another source")
    monkeypatch.setattr(autotuning.matmul_kernels, "__file__", str(tmp_path / "kernels.py"))
    autotuning.autotune(model, file)
    assert len(measured) == 6 * len(first)
    autotuning.autotune(model, file)
    assert len(measured) == 6 * len(first)
    (tmp_path / "file").write_text("")
    autotuning.autotune(
        model, tmp_path / "file" / "variants.json"
    )  # the cache cannot be written, which is not an error
