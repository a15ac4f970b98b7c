"""Recognize directories in formats that the server does not serve, and name the way to a checkpoint that it serves."""

from pathlib import Path

from llama2_server.engine.checkpoint.layout import check_architecture, read_json
from llama2_server.engine.errors import WeightsError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Files of quantizers that do not mark config.json.
QUANTIZER_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
# Weights of other programs, by the files that only they have.
FOREIGN_WEIGHTS = (
    ("*.gguf", "GGUF weights of llama.cpp", "pass the safetensors checkpoint that they were converted from"),
    ("ggml-*.bin", "GGML weights of llama.cpp", "pass the safetensors checkpoint that they were converted from"),
    ("consolidated.*.pth", "Meta's original weights", "convert them with transformers' convert_llama_weights_to_hf.py"),
    ("tf_model*.h5", "TensorFlow weights", "convert them with transformers' save_pretrained"),
    ("flax_model*.msgpack", "Flax weights", "convert them with transformers' save_pretrained"),
    ("*.onnx", "ONNX weights", "pass the safetensors checkpoint that they were converted from"),
    ("openvino_model*.xml", "OpenVINO weights", "pass the safetensors checkpoint that they were converted from"),
)


def check_format(directory: Path) -> None:
    """Check the format of a checkpoint by its file names and config.json, before slow imports.

    Raises:
        WeightsError: the directory contains an adapter, quantized weights, the weights of another program, another
            architecture, or files that Git LFS has not downloaded.
    """
    _check_hub_cache(directory)
    _check_adapter(directory)
    _check_foreign_weights(directory)
    _check_lfs_pointers(directory)
    path = directory / "config.json"
    check_architecture(path, read_json(path))
    for name, quantizer in QUANTIZER_FILES.items():
        if (directory / name).is_file():
            raise WeightsError(
                f"{directory / name}: the weights are quantized with {quantizer}; pass a checkpoint with unquantized "
                "weights"
            )


def _check_hub_cache(directory: Path) -> None:
    snapshots = directory / "snapshots"
    if snapshots.is_dir() and not (directory / "config.json").exists():
        raise WeightsError(
            f"{directory}: a cache folder of the Hugging Face Hub; pass one of the directories in {snapshots}"
        )


def _check_adapter(directory: Path) -> None:
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    kind = config.get("peft_type") or "LoRA"
    kind = "LoRA" if kind == "LORA" else kind
    base = config.get("base_model_name_or_path") or "its base model"
    if _has_safetensors(directory):
        raise WeightsError(
            f"{path}: a {kind} adapter for {base} in the same directory as a model; merge the adapter with peft's "
            "merge_and_unload, or remove this file if the weights are merged already"
        )
    raise WeightsError(
        f"{path}: a {kind} adapter, not a model; merge it into {base} with peft's merge_and_unload, store the result "
        "with save_pretrained, and pass that directory"
    )


def _check_foreign_weights(directory: Path) -> None:
    if _has_safetensors(directory):
        return
    for pattern, kind, remedy in FOREIGN_WEIGHTS:
        if found := sorted(directory.glob(pattern)):
            raise WeightsError(f"{found[0]}: {kind}, which the server does not read; {remedy}")


def _check_lfs_pointers(directory: Path) -> None:
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("tokenizer.*")]):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise WeightsError(f"{path}: a pointer of Git LFS, not the file; run git lfs pull in {directory}")


def _has_safetensors(directory: Path) -> bool:
    return any(not path.name.startswith("adapter") for path in directory.glob("*.safetensors"))
