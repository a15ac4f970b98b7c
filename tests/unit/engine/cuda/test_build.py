"""Tests of the choice of the step runner, of autotuning, and of the verification of the logits."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.cuda.build import build_step_runner, verify_logits
from llama2_server.engine.errors import EngineError
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


def on_fake_gpu(model: LlamaModel) -> Any:
    """Return a stand-in for the model that claims to be on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), slots=model.slots, config=model.config, weights=model.weights)


def test_a_model_on_the_cpu_is_sampled_on_the_host(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """The runner is HostStepRunner, and nothing is logged."""
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(model, compiled=True, cache_directory=None), HostStepRunner)
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
            build_step_runner(on_fake_gpu(model), compiled=True, cache_directory=tmp_path), HostStepRunner
        )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("running in plain torch, which is slower: ")


def _fail(*_: object) -> str:
    raise RuntimeError("no")


def test_gpu_kernels_torch_does_not_touch_the_device(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """The model runs in torch at once, and the log states that it is slower."""
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(on_fake_gpu(model), compiled=False, cache_directory=None), HostStepRunner)
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
    workloads = dict(autotuning._workloads(model))
    seconds = iter([0.3, 0.2, 0.1, *[0.4] * (len(autotuning.VARIANTS) - 3)])
    name, workload = list(workloads.items())[1]  # the smallest matmul, because the interpreter is slow
    assert autotuning.fastest_variant(workload, 1e-5, name, lambda run: next(seconds)) == autotuning.VARIANTS[2]

    def wrong_in_custom_kernels(matmul: Any) -> Tensor:
        result: Tensor = workload(matmul)
        return result if matmul.variants.get(name) is None else result * 1.1

    assert autotuning.fastest_variant(wrong_in_custom_kernels, 1e-5, name, lambda run: 1.0) is None
    assert caplog.text.count("has a relative error of 0.100") == len(autotuning.VARIANTS) - 1


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
    assert requested == dict(autotuning._workloads(model)).keys()


def test_variants_are_cached_for_the_same_device_and_software(
    autotuning: Any, model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start measures nothing; another device, another version or a broken file is measured again."""
    measured: list[str] = []

    def fastest_variant(workload: object, epsilon: float, name: str) -> Any:
        measured.append(name)
        return autotuning.VARIANTS[len(measured) % 2]

    monkeypatch.setattr(autotuning, "fastest_variant", fastest_variant)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
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
    assert len(measured) == 4 * len(first)
    (tmp_path / "file").write_text("")
    autotuning.autotune(
        model, tmp_path / "file" / "variants.json"
    )  # the cache cannot be written, which is not an error
