"""Which steps a model gets, the choice between ways of computing a product, and the proof before anybody is served."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.cuda.build import build_step_runner, proven_error
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


def on_cuda(model: LlamaModel) -> Any:
    """What says that it is on a GPU, where there is none."""
    return SimpleNamespace(device=torch.device("cuda"), slots=model.slots, config=model.config, weights=model.weights)


def test_a_model_on_the_cpu_is_sampled_by_the_host(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to say about it."""
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(model, compiled=True, cache_directory=None), HostStepRunner)
    assert not caplog.records


def test_steps_that_cannot_be_made_are_replaced_by_plain_ones(
    model: LlamaModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the compiler or the driver raises: the server serves, and one line says why it is slower."""
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    if torch.cuda.is_available():
        monkeypatch.setattr("torch.cuda.get_device_name", _refuse)
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(on_cuda(model), compiled=True, cache_directory=tmp_path), HostStepRunner)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("running in plain torch, which is slower: ")


def _refuse(*_: object) -> str:
    raise RuntimeError("no")


def test_compile_off_asks_the_device_for_nothing(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """It starts at once, and says that it is slower."""
    with caplog.at_level(logging.INFO):
        assert isinstance(build_step_runner(on_cuda(model), compiled=False, cache_directory=None), HostStepRunner)
    assert "the settings ask for it (gpu_kernels)" in caplog.text


@pytest.mark.parametrize("unwritten", [0.0, float("nan")])
def test_the_proof_sees_a_wrong_step(model: LlamaModel, unwritten: float) -> None:
    """The model's own step has no error; one that mixes up slots, or forgets a token, is refused.

    So it is whatever the memory holds that it reads by mistake: an error that is no number is no small one.
    """

    def right(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return model.decode(slots.tolist(), token_ids.tolist(), positions.tolist())

    def slots_mixed_up(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return right(token_ids, slots.roll(1), positions)

    def a_token_forgotten(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return right(token_ids, slots, positions - 1)

    with torch.inference_mode():
        for tensor in (*model.kv_cache.keys, *model.kv_cache.values):
            tensor.fill_(unwritten)
    assert proven_error(model, right) == 0
    for wrong in (slots_mixed_up, a_token_forgotten):
        with pytest.raises(EngineError, match="differ"):
            proven_error(model, wrong)


@pytest.fixture
def tuning(device: torch.device) -> Any:
    """The module; imported late, because it needs Triton."""
    from llama2_server.engine.cuda import autotune as tuning

    return tuning


def test_the_fastest_way_is_taken(tuning: Any, model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """Of those that compute the right thing."""
    works = dict(tuning._works(model))
    seconds = iter([0.3, 0.2, 0.1, *[0.4] * (len(tuning.VARIANTS) - 3)])
    name, work = next(iter(works.items()))
    assert tuning.fastest(work, 1e-5, name, lambda run: next(seconds)) == tuning.VARIANTS[2]

    def wrong_in_our_kernels(products: Any) -> Tensor:
        result: Tensor = work(products)
        return result if products.ways.get(name) is None else result * 1.1

    assert tuning.fastest(wrong_in_our_kernels, 1e-5, name, lambda run: 1.0) is None
    assert caplog.text.count("is wrong by 0.100 on this device") == len(tuning.VARIANTS) - 1


def test_every_product_of_a_step_is_measured(tuning: Any, model: LlamaModel) -> None:
    """By the name under which the step looks for its way; one that nobody measured would be torch's in silence."""
    from llama2_server.engine.cuda.forward import Forward
    from llama2_server.engine.cuda.matmul import Matmul

    asked: set[str] = set()

    class Noting(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return default

    products = Matmul(1e-5)
    products.ways = Noting()
    numbers = torch.tensor([0])
    Forward(model, products)(numbers, numbers, numbers)
    assert asked == dict(tuning._works(model)).keys()


def test_ways_are_kept_for_the_same_device_and_software(
    tuning: Any, model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start measures nothing; another device, another version and a broken file are measured anew."""
    measured: list[str] = []

    def fastest(work: object, epsilon: float, name: str) -> Any:
        measured.append(name)
        return tuning.VARIANTS[len(measured) % 2]

    monkeypatch.setattr(tuning, "fastest", fastest)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    file = tmp_path / "there" / "ways.json"
    first = tuning.autotune(model, file)
    assert list(first) == measured
    assert tuning.autotune(model, file) == first
    assert list(first) == measured
    file.write_text(file.read_text().replace("4", "four", 1))
    tuning.autotune(model, file)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "another GPU")
    tuning.autotune(model, file)
    file.write_text("{")
    tuning.autotune(model, file)
    assert len(measured) == 4 * len(first)
    (tmp_path / "file").write_text("")
    tuning.autotune(model, tmp_path / "file" / "ways.json")  # nowhere to keep them, and no harm
