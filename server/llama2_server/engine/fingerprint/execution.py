"""The part of a fingerprint that names how a model computes: kernels, precision, and what the kernels depend on."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from llama2_server.engine.checkpoint.config_cache import ModelMetadata
from llama2_server.engine.cuda.driver import driver_versions
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import StepKind, StepRunner
from llama2_server.engine.text.tokenizer import Tokenizer

ALGORITHM_VERSION = 3
"""The version of our own arithmetic, sampling, tokenization and chat template. A change of any bit raises it. The table
of `tests/support/sampling/sampled_texts.py` finds such a change; `python -m tools.checks.algorithm` reminds of it."""
AMX_VERSION = 1
"""The version of the arithmetic of the AMX kernels. A change of any of their bits raises it, instead of
ALGORITHM_VERSION, so that fingerprints of the portable kernels stay."""
# Variables that change the results of torch and of the libraries that it calls.
LIBRARY_VARIABLES = ("ATEN_", "CUBLAS", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_", "PYTORCH_", "TORCH_")
# Lines of /proc/cpuinfo by which libraries select their kernels and block sizes, on x86 and on Arm.
PROCESSOR_LINES = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
)


def checkpoint_inputs(directory: Path, metadata: ModelMetadata, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the inputs that come from the small files of a checkpoint; the weights have their own digest."""
    shape = {key: value for key, value in asdict(metadata.config).items() if key != "max_positions"}
    path = directory / tokenizer.file_name
    library = "tokenizers" if path.suffix == ".json" else "sentencepiece"
    return {
        "model shape": _digest(shape),
        "end of sequence": ",".join(map(str, sorted(metadata.eos_ids))),
        "tokenizer": f"{hashlib.sha256(path.read_bytes()).hexdigest()}, {library} {version(library)}",
    }


def execution_inputs(model: LlamaModel, step_runner: StepRunner) -> dict[str, str]:
    """Return the inputs that describe how this process computes.

    Within a family, the C++ kernels give the same bits on every processor that supports it, with every number of
    threads and rows, and with 12 or 16 bits per weight. torch and its libraries promise nothing of this.
    """
    inputs = {
        "algorithm": str(ALGORITHM_VERSION),
        "kernels": f"native, amx {AMX_VERSION}" if model.kernels == "amx" else step_runner.kind.value,
        "precision": str(model.dtype).removeprefix("torch."),
        "rotary": _rotary_digest(model),
    }
    if step_runner.kind is StepKind.NATIVE:
        return inputs
    inputs["torch"] = f"{torch.__version__}, {_digest(torch.__config__.show())}"
    inputs["variables"] = _digest(dict(_library_variables()))
    # The chunks of a prompt decide the order of sums.
    inputs["prefill chunk"] = str(model.prefill_chunk_tokens)
    if model.device.type == "cuda":
        return inputs | _cuda_inputs(model.device) | step_runner.kernel_choices
    return inputs | {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {_digest(_processor())}",
        "threads": str(model.threads),
    }


def depends_on_neighbors(model: LlamaModel) -> bool:
    """Return whether the bits of a row can depend on the other rows: cuBLAS selects its kernel by their number."""
    return model.device.type == "cuda" and model.slots > 1


def _rotary_digest(model: LlamaModel) -> str:
    """Hash the tables of sines and cosines, which torch computes for every kind of kernel."""
    digest = hashlib.sha256()
    for table in model.rotary:
        digest.update(table.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _cuda_inputs(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors"
        ),
        "driver": driver_versions(),
        "libraries": f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
        "reduction": str(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction),
        "float32 products": torch.get_float32_matmul_precision(),
    }


def _library_variables() -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in os.environ.items() if name.startswith(LIBRARY_VARIABLES))


def _processor() -> dict[str, str]:
    """Return what the operating system reports about the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:  # not Linux
        return {"processor": platform.processor()}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in PROCESSOR_LINES}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
