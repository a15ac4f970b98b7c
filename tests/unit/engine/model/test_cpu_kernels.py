"""The choice between the families of CPU kernels: by processor, sizes and self-check, with one log record."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.checkpoints import MakeCheckpoint
from tests.unit.engine.native.models import library, load, some_ids, supported

from llama2_server.engine.model import cpu_kernels
from llama2_server.engine.model.cpu_kernels import CpuKernels, amx_is_exact, choose_layout, runs_amx
from llama2_server.engine.model.packed_weights import PackedMatrix
from llama2_server.engine.model.weight_layout import AMX, ROWS, TileLayout
from llama2_server.engine.model.weights import LlamaConfig
from llama2_server.engine.native.processor import has_amx

LARGE = 64 * 1024 * 1024
SMALL = LARGE // 4
SUITABLE = LlamaConfig(600, 64, 176, 2, 4, 4, 16, 1e-5, 1e4, 128, tied_embeddings=False)
UNSUITABLE = LlamaConfig(600, 100, 90, 2, 5, 5, 20, 1e-5, 1e4, 128, tied_embeddings=False)
UNSUITABLE_REASON = (
    "AMX needs sizes that are multiples of 16 (queries 100, keys 100, intermediate size 90); "
    "running with the portable kernels"
)
REFUSED = "AMX is not available, although the processor has it: the system or the compiler of the library refuses it"
INEXACT = "AMX fails its self-check: a product differs from the exact result"


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor with AMX, whose self-check is correct, and with AVX-512."""
    names = {b"": b"AVX-512", b"AMX": b"AMX"}
    monkeypatch.setattr(library(), "llama2_instructions", names.get)
    monkeypatch.setattr(cpu_kernels, "has_amx", lambda: True)
    monkeypatch.setattr(cpu_kernels, "amx_is_exact", lambda: True)
    yield
    amx_is_exact.cache_clear()


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the log records of the engine; a warning about another test's leftovers can come at any time."""
    return [record for record in caplog.records if record.name.startswith("llama2_server.engine.")]


def without_amx(patch: pytest.MonkeyPatch) -> None:
    refused(patch)
    patch.setattr(cpu_kernels, "has_amx", lambda: False)


def refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(library(), "llama2_instructions", {b"": b"AVX-512"}.get)


def inexact(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_kernels, "amx_is_exact", lambda: False)


@pytest.mark.parametrize(
    ("kernels", "size_bytes", "runs"),
    [
        ("auto", LARGE, True),
        ("auto", SMALL, False),
        ("portable", LARGE, False),
        ("amx", LARGE, True),
        ("amx", SMALL, True),
        ("torch", LARGE, False),
    ],
)
def test_the_setting_and_the_size_decide(
    kernels: CpuKernels, size_bytes: int, runs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Small models keep one text on every processor, unless the setting is amx; nothing is logged."""
    with caplog.at_level(logging.INFO):
        assert runs_amx(kernels, SUITABLE, size_bytes) == runs
    assert records(caplog) == []


def test_weights_have_12_bits_for_any_number_of_slots() -> None:
    """Only 16 turns them off; with the portable kernels, the number of slots counts as before."""
    for slots in (1, 8):
        for bits in ("auto", "12"):
            assert choose_layout("auto", bits, SUITABLE, LARGE, slots) == TileLayout(twelve_bits=True)
        assert choose_layout("auto", "16", SUITABLE, LARGE, slots) == TileLayout(twelve_bits=False)
    assert choose_layout("portable", "auto", SUITABLE, LARGE, 1) is ROWS
    assert choose_layout("portable", "auto", SUITABLE, LARGE, 8) is None
    assert choose_layout("portable", "16", SUITABLE, LARGE, 1) is None
    assert choose_layout("torch", "12", SUITABLE, LARGE, 1) is None


@pytest.mark.parametrize(("change", "reason"), [(refused, REFUSED), (inexact, INEXACT)])
@pytest.mark.parametrize(("kernels", "prefix"), [("auto", ""), ("amx", "--cpu-kernels is amx, but ")])
def test_a_processor_with_amx_that_cannot_use_it_logs_one_warning(
    change: object,
    reason: str,
    kernels: CpuKernels,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The portable kernels run the model."""
    assert callable(change)
    change(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert choose_layout(kernels, "12", SUITABLE, LARGE, 1) is ROWS
    (record,) = records(caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{prefix}{reason}; running with the portable kernels"


def test_another_processor_logs_only_if_the_setting_is_amx(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The default needs no explanation there."""
    without_amx(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert not runs_amx("auto", SUITABLE, LARGE)
        assert records(caplog) == []
        assert not runs_amx("amx", SUITABLE, LARGE)
    (record,) = records(caplog)
    assert record.getMessage() == (
        "--cpu-kernels is amx, but this processor does not support AMX; running with the portable kernels"
    )


def test_sizes_that_do_not_fill_tiles_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """For information with auto, and as a warning if the setting is amx."""
    with caplog.at_level(logging.INFO):
        assert not runs_amx("auto", UNSUITABLE, LARGE)
        assert not runs_amx("amx", UNSUITABLE, LARGE)
    assert [(record.levelno, record.getMessage()) for record in records(caplog)] == [
        (logging.INFO, UNSUITABLE_REASON),
        (logging.WARNING, f"--cpu-kernels is amx, but {UNSUITABLE_REASON}"),
    ]


def test_without_native_kernels_only_torch_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, checkpoint: MakeCheckpoint
) -> None:
    """One record gives the reason for torch, none speaks of the portable kernels."""
    monkeypatch.setattr(library(), "llama2_instructions", lambda name: None)
    model = load(checkpoint(dtype=torch.float16), cpu_kernels="amx")
    (record,) = records(caplog)
    assert record.getMessage().startswith("running in torch, which is slower: ")
    assert model.kernels == ""


@pytest.mark.parametrize(("flags", "found"), [("fpu amx_bf16 amx_tile amx_int8", True), ("fpu amx_tile", False)])
def test_the_flags_of_the_processor_are_read(flags: str, found: bool, tmp_path: Path) -> None:
    """Both flags count, of the first processor; a system without them has no AMX."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert has_amx(tmp_path) == found
    assert not has_amx(tmp_path / "other")


def test_a_loaded_model_uses_the_chosen_family(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, checkpoint: MakeCheckpoint
) -> None:
    """The log names AMX, all matrices are in tiles, and a prompt step has more tokens; small models stay portable."""
    monkeypatch.undo()
    supported(AMX)
    directory = checkpoint(dtype=torch.float16)
    for size_limit, kernels, family in [(0, "auto", "amx"), (LARGE, "auto", "portable"), (LARGE, "amx", "amx")]:
        monkeypatch.setattr(cpu_kernels, "MIN_PACKED_BYTES", size_limit)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = load(directory, cpu_kernels=kernels)
        assert model.kernels == family
        assert any("running natively with AMX, threads: 1" in text for text in caplog.messages) == (family == "amx")
        assert all(isinstance(matrix, PackedMatrix) for matrix in model.weights.matrices) == (family == "amx")
        assert (model.prefill_chunk_tokens > 48) == (family == "amx")
        assert model.prefill(0, some_ids(100), 0).isfinite().all()


def test_the_self_check_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of this processor are exact; one wrong bit in any of them is found."""
    monkeypatch.undo()
    supported(AMX)
    assert amx_is_exact()
    multiply = PackedMatrix.multiply
    for wrong in range(6):
        calls = iter(range(6))

        def changed(matrix: PackedMatrix, x: torch.Tensor, calls: Iterator[int] = calls, wrong: int = wrong) -> object:
            found = multiply(matrix, x)
            found.view(torch.int32)[-1, -1] ^= int(next(calls) == wrong)
            return found

        monkeypatch.setattr(PackedMatrix, "multiply", changed)
        amx_is_exact.cache_clear()
        assert not amx_is_exact()
