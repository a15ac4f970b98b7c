"""Whom we compare ourselves with, and in which Python environment each of them is to be found."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(".venv/peers")  # one a family, where this environment does not have it; see README.md

OURS_COPIES = 2.5

_MISSING = """
import sys
from importlib.util import find_spec
missing = [name for name in sys.argv[1:] if find_spec(name) is None]
print(", ".join(missing))
"""


@dataclass(frozen=True)
class Peer:
    """A way of running another library."""

    name: str
    module: str  # under benchmarks.workers
    family: str  # its environment's name
    needs: tuple[str, ...]  # what has to be importable
    arithmetic: str = ""
    copies: float = 1.1  # memory that it takes, in float16 weights


_LLAMA_CPP = ("llama_cpp", "gguf", "safetensors", "sentencepiece")
_CTRANSLATE2 = ("ctranslate2", "transformers", "torch")
_OPENVINO = ("openvino", "optimum")

PEERS = (
    Peer("transformers.generate", "transformers_generate", "transformers", ("transformers", "torch")),
    Peer("llama.cpp F16", "llama_cpp_decode", "llama_cpp", _LLAMA_CPP, "F16"),
    Peer("llama.cpp BF16", "llama_cpp_decode", "llama_cpp", _LLAMA_CPP, "BF16"),
    Peer("OpenVINO f16", "openvino_infer", "openvino", _OPENVINO, "f16", copies=1.3),
    Peer("OpenVINO bf16", "openvino_infer", "openvino", _OPENVINO, "bf16", copies=1.3),
    Peer("OpenVINO f32", "openvino_infer", "openvino", _OPENVINO, "f32", copies=1.3),
    Peer("CTranslate2 bfloat16", "ctranslate2_generate", "ctranslate2", _CTRANSLATE2, "bfloat16"),
    Peer("CTranslate2 float32", "ctranslate2_generate", "ctranslate2", _CTRANSLATE2, "float32", copies=2.1),
)


def chosen(wanted: str) -> list[Peer]:
    """The peers whose names hold one of the words, which commas separate; or "all", or "none"."""
    if wanted in ("all", "none"):
        return list(PEERS) if wanted == "all" else []
    words = [word.strip().lower() for word in wanted.split(",")]
    return [peer for peer in PEERS if any(word in peer.name.lower() for word in words)]


def interpreter(peer: Peer, given: Mapping[str, str]) -> tuple[str | None, str]:
    """The Python that has what a peer needs, and otherwise what is missing; `given` are Pythons by family."""
    own = ENVIRONMENTS / peer.family / "bin" / "python"
    if peer.family in given:
        candidates = [given[peer.family]]
    else:
        candidates = [*([str(own)] if own.exists() else []), sys.executable]
    for candidate in candidates:
        found = subprocess.run([candidate, "-c", _MISSING, *peer.needs], capture_output=True, text=True, check=True)
        missing = found.stdout.strip()
        if not missing:
            return candidate, ""
    return None, f"not installed: {missing}"


def groups(peers: Iterable[Peer], weights_bytes: int, free_bytes: int) -> list[list[Peer]]:
    """Peers that fit into memory together, beside our engine and our service; a peer that never fits is alone."""
    room = 0.95 * free_bytes / weights_bytes - OURS_COPIES
    result: list[list[Peer]] = []
    for peer in peers:
        fitting = (group for group in result if sum(other.copies for other in group) + peer.copies <= room)
        group = next(fitting, None)
        if group is None:
            result.append([peer])
        else:
            group.append(peer)
    return result or [[]]
