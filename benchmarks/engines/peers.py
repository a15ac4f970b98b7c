"""The registry of peers, and the lookup of a Python environment for each."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(".venv/peers")  # one environment per family; see README.md

# Memory of our engine and our service together, in multiples of the float16 weights.
OWN_COPIES = 2.5

_LIST_MISSING = """
import sys
from importlib.util import find_spec
missing = [name for name in sys.argv[1:] if find_spec(name) is None]
print(", ".join(missing))
"""


@dataclass(frozen=True)
class Peer:
    """One configuration of another inference library."""

    name: str
    module: str  # under benchmarks.workers
    family: str  # the name of its environment
    required_modules: tuple[str, ...]
    arithmetic: str = ""
    copies: float = 1.1  # its memory, in multiples of the float16 weights


_LLAMA_CPP = ("llama_cpp", "gguf", "safetensors", "sentencepiece")
_CTRANSLATE2 = ("ctranslate2", "transformers", "torch")
_OPENVINO = ("openvino", "optimum")
_OPENVINO_GENAI = ("openvino_genai", "openvino_tokenizers", "optimum")
_ONNXRUNTIME = ("onnxruntime_genai", "onnx", "transformers", "torch")

PEERS = (
    Peer("transformers.generate", "transformers_generate", "transformers", ("transformers", "torch")),
    Peer("llama.cpp F16", "llama_cpp_decode", "llama_cpp", _LLAMA_CPP, "F16"),
    Peer("llama.cpp BF16", "llama_cpp_decode", "llama_cpp", _LLAMA_CPP, "BF16"),
    Peer("OpenVINO f16", "openvino_models.infer", "openvino", _OPENVINO, "f16", copies=1.3),
    Peer("OpenVINO bf16", "openvino_models.infer", "openvino", _OPENVINO, "bf16", copies=1.3),
    Peer("OpenVINO f32", "openvino_models.infer", "openvino", _OPENVINO, "f32", copies=1.3),
    Peer("OpenVINO GenAI bf16", "openvino_models.genai", "openvino_genai", _OPENVINO_GENAI, "bf16", copies=1.3),
    Peer("vLLM bfloat16", "vllm_generate", "vllm", ("vllm",), copies=2.5),
    Peer("ONNX Runtime GenAI float32", "onnxruntime_genai_generate", "onnxruntime_genai", _ONNXRUNTIME, copies=2.2),
    Peer("CTranslate2 bfloat16", "ctranslate2_generate", "ctranslate2", _CTRANSLATE2, "bfloat16"),
    Peer("CTranslate2 float32", "ctranslate2_generate", "ctranslate2", _CTRANSLATE2, "float32", copies=2.1),
)


def select_peers(pattern: str) -> list[Peer]:
    """Return the peers whose names contain one of the comma-separated words; "all" and "none" are also accepted."""
    if pattern in ("all", "none"):
        return list(PEERS) if pattern == "all" else []
    words = [word.strip().lower() for word in pattern.split(",")]
    return [peer for peer in PEERS if any(word in peer.name.lower() for word in words)]


def find_interpreter(peer: Peer, pythons: Mapping[str, str]) -> tuple[str | None, str]:
    """Return a Python that has the required modules of a peer, or None and the reason.

    `pythons` maps families to interpreters that the command line names.
    """
    own = ENVIRONMENTS / peer.family / "bin" / "python"
    if peer.family in pythons:
        candidates = [pythons[peer.family]]
    else:
        candidates = [*([str(own)] if own.exists() else []), sys.executable]
    for candidate in candidates:
        command = [candidate, "-c", _LIST_MISSING, *peer.required_modules]
        missing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not missing:
            return candidate, ""
    return None, f"not installed: {missing}"


def group_by_memory(peers: Iterable[Peer], weights_bytes: int, free_bytes: int) -> list[list[Peer]]:
    """Split peers into groups that fit into memory together with our engine and our service.

    A peer that never fits gets its own group. Without peers there is one empty group.
    """
    available_copies = 0.95 * free_bytes / weights_bytes - OWN_COPIES
    groups: list[list[Peer]] = []
    for peer in peers:
        fitting = (g for g in groups if sum(other.copies for other in g) + peer.copies <= available_copies)
        group = next(fitting, None)
        if group is None:
            groups.append([peer])
        else:
            group.append(peer)
    return groups or [[]]
