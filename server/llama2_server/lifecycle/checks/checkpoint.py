"""The checkpoint that the settings name, and what its files show before torch is imported."""

from importlib import resources
from pathlib import Path

from llama2_server.card import ModelCard
from llama2_server.config.settings import DEMO_CARD, Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.checkpoint.formats import check_format
from llama2_server.engine.checkpoint.hub.download import find_checkpoint
from llama2_server.engine.checkpoint.hub.plan import cached_checkpoint
from llama2_server.engine.checkpoint.layout import check_context, read_headers, read_json
from llama2_server.engine.cuda.driver import has_nvidia_device
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.memory import MemoryNeed, available_bytes, check_memory
from llama2_server.engine.native.processor import has_amx

DEMO_WEIGHTS = "demo"
"""The value of `--weights` for the weights of the demo model, which any card accepts."""
HEAD = "lm_head.weight"


def uses_demo_weights(settings: Settings) -> bool:
    """Return whether the settings select the weights that ship with the package."""
    return settings.weights == DEMO_WEIGHTS or (settings.weights is None and settings.card == DEMO_CARD)


def demo_checkpoint() -> Path:
    """Return the directory of the demo model."""
    return Path(str(resources.files("llama2_server") / "demo"))


def check_checkpoint(settings: Settings, card: ModelCard) -> None:
    """Check the format, the files and the memory of a checkpoint on this machine, or the disk space of a download.

    Raises:
        ConfigurationError: the server cannot serve it.
    """
    if uses_demo_weights(settings):
        return
    if settings.weights is None:
        raise ConfigurationError(
            "--weights: this card needs weights; pass a checkpoint directory, a Hub id such as "
            "meta-llama/Llama-2-7b-chat-hf, or demo for the weights of the demo model"
        )
    try:
        directory = find_checkpoint(settings.weights) or cached_checkpoint(settings.weights)
        if directory is not None:
            _check_files(directory, settings, card)
    except (WeightsError, OSError) as error:
        raise weights_problem(error) from error


def weights_problem(error: WeightsError | OSError) -> ConfigurationError:
    """Return the error of a checkpoint that cannot be used, or one of whose files cannot be read."""
    if isinstance(error, WeightsError):
        return ConfigurationError(f"--weights: {error}")
    name = error.filename or "a file of the checkpoint"
    return ConfigurationError(
        f"--weights: {name}: cannot be read ({error.strerror or error}); let the user who runs the server read the "
        "directory and all files in it"
    )


def _check_files(directory: Path, settings: Settings, card: ModelCard) -> None:
    check_format(directory)
    config = read_json(directory / "config.json")
    positions = settings.max_position_embeddings or config.get("max_position_embeddings")
    if isinstance(positions, int):  # the loader reports another type
        check_context(directory, positions, card.context_length_limit)
    headers = read_headers(directory)
    if settings.device == "cuda" or (settings.device == "auto" and has_nvidia_device()):
        return  # the loader asks the driver for the memory of the card
    dtype = settings.dtype or card.generation_config.dtype
    element_bytes = 4 if dtype == "float32" else 2
    # The loader measures how many weights take 12 bits instead of 16; this is the least that they can need.
    slots, context_length = card.max_concurrent_requests, card.context_length_limit
    packed = dtype == "float16" and _may_pack(settings, slots)
    tied = bool(config.get("tie_word_embeddings"))
    elements = sum(entry.elements for name, entry in headers.items() if not (tied and name == HEAD))
    # A key projection has one row per element of a key.
    rows = sum(entry.shape[0] for name, entry in headers.items() if name.endswith("self_attn.k_proj.weight"))
    need = MemoryNeed(
        weights_bytes=elements * element_bytes * 3 // 4 if packed else elements * element_bytes,
        cache_bytes=element_bytes * 2 * slots * context_length * rows,
        tokens=f"{slots} x {context_length} tokens",
    )
    check_memory(directory, "cpu", need, available_bytes())


def _may_pack(settings: Settings, slots: int) -> bool:
    """Return whether a CPU may store float16 weights in 12 bits; with AMX it does so for any number of slots."""
    if settings.cpu_kernels == "torch" or settings.cpu_weight_bits == "16":
        return False
    amx = settings.cpu_kernels != "portable" and has_amx()
    return settings.cpu_weight_bits == "12" or slots == 1 or amx
