"""The fingerprint of a loaded model: equal where texts are equal, another one for each input that changes a text."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.checkpoints import edit_json
from tests.support.service import with_config
from tools.make_checkpoint import Shape, make_checkpoint, make_tokenizer

from llama2_server.card import ModelCard, load_card
from llama2_server.config.settings import Settings
from llama2_server.engine.fingerprint import execution, weights
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.model import llama
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner, StepKind
from llama2_server.lifecycle.model_loading import load_model

SHAPE = Shape(context=1024)
CARD = load_card("demo")
Change = Callable[[Path], object]
"""Changes a checkpoint."""


@pytest.fixture(autouse=True)
def _hash_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash the weights before `load_model` returns."""
    immediate = SimpleNamespace(Thread=lambda target, **_: SimpleNamespace(start=target))
    monkeypatch.setattr(weights, "threading", immediate)
    monkeypatch.setattr(weights, "_lower_priority", lambda: None)


def fingerprint(checkpoint: Path, data_directory: Path, card: ModelCard = CARD, **settings: object) -> Fingerprint:
    """Return the fingerprint of a model on the CPU."""
    values = {"weights": str(checkpoint), "data_directory": data_directory, "device": "cpu", **settings}
    return load_model(Settings.model_validate(values), card).fingerprint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint."""
    return make_checkpoint(tmp_path_factory.mktemp("weights"), SHAPE)


def with_defaults(**changes: Any) -> ModelCard:
    """Return the card with other defaults."""
    return CARD.model_copy(update={"generation_config": CARD.generation_config.model_copy(update=changes)})


SAME_CARDS = {
    "name and prices": CARD.model_copy(update={"description": "other", "tags": ()}),
    "rows": with_config(CARD, max_concurrent_requests=8),
    "quota": with_config(CARD, max_requests_per_min={"default": 1}),
}
OTHER_CARDS = {
    "context": CARD.model_copy(update={"context_length_limit": CARD.context_length_limit - 1}),
    "sequence": CARD.model_copy(update={"sequence_length_limit": CARD.sequence_length_limit - 1}),
    "max_tokens": CARD.model_copy(update={"default_max_tokens": CARD.default_max_tokens - 1}),
    "temperature": with_defaults(temperature=0.4),
    "top_p": with_defaults(top_p=0.5),
    "penalty": with_defaults(presence_penalty=0.5),
    "system prompt": with_defaults(system_prompt="You are a llama."),
}


@pytest.mark.parametrize("name", SAME_CARDS)
def test_cards_with_equal_texts(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Prices, quotas, descriptions and the number of slots change no text."""
    assert fingerprint(checkpoint, tmp_path, SAME_CARDS[name]).value == fingerprint(checkpoint, tmp_path).value


@pytest.mark.parametrize("name", OTHER_CARDS)
def test_cards_with_other_texts(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Each limit and each default of the card can change the text of a request that leaves the field unset."""
    other, base = fingerprint(checkpoint, tmp_path, OTHER_CARDS[name]), fingerprint(checkpoint, tmp_path)
    assert other.value != base.value
    assert other.cache_identity != base.cache_identity


def test_settings_with_equal_texts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart, another data directory, 12 bits per weight, more threads and variables of libraries change no text."""
    base = fingerprint(checkpoint, tmp_path).value
    assert base is not None
    assert len(base) == 64
    assert fingerprint(checkpoint, tmp_path).value == base
    assert fingerprint(checkpoint, tmp_path / "other").value == base
    for bits in ("12", "16"):
        assert fingerprint(checkpoint, tmp_path, cpu_weight_bits=bits).value == base
    monkeypatch.setattr(llama, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(llama, "CPU_THREADS", 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fingerprint(checkpoint, tmp_path).value == base


def copy_with(change: Change) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        checkpoint = make_checkpoint(folder / "changed", SHAPE)
        change(checkpoint)
        return checkpoint

    return make


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "weights": lambda folder: make_checkpoint(folder / "changed", SHAPE, seed=1),
    "shards": lambda folder: make_checkpoint(folder / "changed", SHAPE, shards=2),
    "end of sequence": copy_with(lambda path: edit_json(path, "generation_config.json", eos_token_id=[2, 5])),
    "epsilon": copy_with(lambda path: edit_json(path, "config.json", rms_norm_eps=1e-3)),
    "rotary base": copy_with(
        lambda path: edit_json(path, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    ),
    "tokenizer": copy_with(lambda path: make_tokenizer(path / "tokenizer.model", SHAPE.vocab - 1)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_other_checkpoints(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Every file that decides a text has a part in the fingerprint."""
    other, base = fingerprint(CHECKPOINTS[name](tmp_path), tmp_path), fingerprint(checkpoint, tmp_path)
    assert None not in (other.value, base.value)
    assert other.value != base.value


def test_an_equal_copy_is_equal(checkpoint: Path, tmp_path: Path) -> None:
    """The place and the time of the files do not matter, only their content."""
    copied = make_checkpoint(tmp_path / "copy", SHAPE)
    assert fingerprint(copied, tmp_path).value == fingerprint(checkpoint, tmp_path).value


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"cpu_kernels": "torch"}], ids=str)
def test_other_kernels_and_precisions(checkpoint: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Kernels and precisions differ from each other, also in the response cache before the weights are hashed."""
    other, base = fingerprint(checkpoint, tmp_path, **settings), fingerprint(checkpoint, tmp_path)
    assert other.value != base.value
    assert other._quick != base._quick


def test_the_families_of_native_kernels_differ(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts can differ between them, so the response cache does, too. The portable ones keep their fingerprint."""
    base = fingerprint(checkpoint, tmp_path)
    portable = fingerprint(checkpoint, tmp_path, cpu_kernels="portable")
    assert (portable.value, portable.inputs["kernels"]) == (base.value, "native")
    monkeypatch.setattr(LlamaModel, "kernels", "amx")
    amx = fingerprint(checkpoint, tmp_path)
    assert amx.inputs["kernels"] == f"native, amx {execution.AMX_VERSION}"
    assert amx.value != base.value
    assert amx._quick != base._quick
    monkeypatch.setattr(execution, "AMX_VERSION", execution.AMX_VERSION + 1)
    assert fingerprint(checkpoint, tmp_path).value != amx.value


def test_the_version_of_the_algorithm_counts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of our kernels has another fingerprint."""
    base = fingerprint(checkpoint, tmp_path).value
    monkeypatch.setattr(execution, "ALGORITHM_VERSION", execution.ALGORITHM_VERSION + 1)
    assert fingerprint(checkpoint, tmp_path).value != base


TORCH_CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "threads": lambda patch: patch.setattr(llama, "CPU_THREADS", 2),
    "version": lambda patch: patch.setattr(torch, "__version__", "9.9"),
    "libraries": lambda patch: patch.setattr(torch.__config__, "show", lambda: "other"),
    "processor": lambda patch: patch.setattr(execution, "_processor", lambda: {"flags": "other"}),
    "instructions": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other"),
    "variable": lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
}


@pytest.mark.parametrize("name", TORCH_CHANGES)
def test_torch_depends_on_its_surroundings(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With torch, everything that its libraries may look at has a part; the native kernels depend on none of it."""
    monkeypatch.setattr(llama, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(llama, "CPU_THREADS", 1)

    def found() -> list[str | None]:
        return [fingerprint(checkpoint, tmp_path, cpu_kernels=kernels).value for kernels in ("torch", "auto")]

    base, base_native = found()
    TORCH_CHANGES[name](monkeypatch)
    changed, native = found()
    assert changed != base
    assert native == base_native


class CudaModel:
    """The properties of a model on a GPU that a fingerprint reads."""

    def __init__(self, slots: int = 1) -> None:
        self.device = SimpleNamespace(type="cuda")
        self.dtype = torch.float16
        self.kernels = ""
        self.slots = slots
        self.prefill_chunk_tokens = 512
        self.rotary = (torch.zeros(2, 2), torch.ones(2, 2))


GPU = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
CUDA_CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any, Any], None]] = {
    "device": lambda patch, model, runner: set_device(patch, name="H200"),
    "multiprocessors": lambda patch, model, runner: set_device(patch, multi_processor_count=114),
    "driver": lambda patch, model, runner: patch.setattr(execution, "driver_versions", lambda: "2, 580"),
    "CUDA": lambda patch, model, runner: patch.setattr(torch.version, "cuda", "99"),
    "cuDNN": lambda patch, model, runner: patch.setattr(torch.backends.cudnn, "version", lambda: 99),
    "torch": lambda patch, model, runner: patch.setattr(torch, "__version__", "9.9"),
    "cuBLAS": lambda patch, model, runner: patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    "precision": lambda patch, model, runner: patch.setattr(model, "dtype", torch.bfloat16),
    "tables": lambda patch, model, runner: patch.setattr(model, "rotary", (torch.ones(2, 2), torch.ones(2, 2))),
    "variants": lambda patch, model, runner: patch.setattr(runner, "kernel_choices", {"matmul variants": "b"}),
    "chunk": lambda patch, model, runner: patch.setattr(model, "prefill_chunk_tokens", 1024),
    "kind": lambda patch, model, runner: patch.setattr(runner, "kind", StepKind.TORCH),
}


def set_device(patch: pytest.MonkeyPatch, **changes: object) -> None:
    device = SimpleNamespace(**(vars(GPU) | changes))
    patch.setattr(torch.cuda, "get_device_properties", lambda _: device)


@pytest.mark.parametrize("name", CUDA_CHANGES)
def test_a_gpu_depends_on_device_driver_libraries_and_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, driver, libraries and the variants that the start has chosen each have a part."""
    model: Any = CudaModel()
    runner: Any = HostStepRunner(model)
    runner.kind, runner.kernel_choices = StepKind.CUDA_GRAPHS, {"matmul variants": "a"}
    set_device(monkeypatch)
    monkeypatch.setattr(execution, "driver_versions", lambda: "1, 570")
    base = json.dumps(execution.execution_inputs(model, runner), sort_keys=True)
    assert json.dumps(execution.execution_inputs(model, runner), sort_keys=True) == base
    CUDA_CHANGES[name](monkeypatch, model, runner)
    assert json.dumps(execution.execution_inputs(model, runner), sort_keys=True) != base


def test_several_slots_of_a_gpu_depend_on_neighbors(checkpoint: Path) -> None:
    """CuBLAS selects a kernel by the number of rows; a CPU computes rows one by one, or each with the same bits."""
    models: list[Any] = [CudaModel(slots=1), CudaModel(slots=2)]
    assert [execution.depends_on_neighbors(model) for model in models] == [False, True]
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"), slots=8)
    assert not execution.depends_on_neighbors(on_cpu)
