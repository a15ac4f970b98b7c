"""Forms of checkpoints that people have and that the server does not serve, with the remedy of the error."""

from pathlib import Path

import torch
from tests.integration.checkpoints.served_forms import Form, drop, made, only_tokenizer_json, set_template, write_json
from tests.support.checkpoints import Edit, config, edit_tensors, only_pickles, overwrite, remove, tensors, truncate
from tools.make_checkpoint import make_tokenizer

from llama2_server.engine.checkpoint.loader import EMBEDDING, HEAD

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 13476835328\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
VICUNA = "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}: {{ m.content }} {% endfor %}ASSISTANT:"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def files(*names: str) -> Form:
    """Return a form: a directory with files of another program."""

    def make(directory: Path) -> None:
        directory.mkdir()
        for name in names:
            (directory / name).write_bytes(b"weights")

    return make


def adapter(directory: Path) -> None:
    """Make the directory that peft saves."""
    files("adapter_model.safetensors", "README.md")(directory)
    write_json("adapter_config.json", ADAPTER)(directory)


def with_bin(name: str) -> Edit:
    """Return an edit that renames the weights."""
    return lambda directory: (directory / "model.safetensors").rename(directory / name)


def hub_cache(directory: Path) -> None:
    """Make the folder of a model in the cache of the Hub."""
    made()(directory / "snapshots" / "f5db02db724555f92da89c216ac04704f23d4590")
    (directory / "blobs").mkdir()


def training_output(directory: Path) -> None:
    """Make the output folder of a trainer, whose checkpoints are in subfolders."""
    directory.mkdir()
    made()(directory / "checkpoint-500")
    (directory / "trainer_state.json").write_text("{}")


def different_head(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({HEAD: t[EMBEDDING] + 1}))


def renamed(directory: Path) -> None:
    """Add the prefix of torch.compile to each name."""
    edit_tensors(directory, lambda t: t.update({f"_orig_mod.{name}": t.pop(name) for name in list(t)}))


def unreadable(name: str) -> Edit:
    """Return an edit that replaces a file with one that exists, and that not even root can read."""

    def replace(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to("/proc/self/mem")

    return replace


def with_tokenizer(size: int) -> Edit:
    return lambda directory: make_tokenizer(directory / "tokenizer.model", size)


def quantized(**fields: object) -> Form:
    return made(config(quantization_config=fields))


REJECTED: dict[str, tuple[Form, str]] = {
    "LoRA adapter": (
        adapter,
        r"adapter_config\.json: a LoRA adapter, not a model; merge it into meta-llama/Llama-2-7b-hf with peft's",
    ),
    "LoRA adapter in a model": (
        made(write_json("adapter_config.json", ADAPTER)),
        "a LoRA adapter for .* in the same directory as a model; merge the adapter .*, or remove this file",
    ),
    "GGUF": (files("llama-2-7b-chat.Q4_K_M.gguf"), r"Q4_K_M\.gguf: GGUF weights .*; pass the safetensors checkpoint"),
    "GGUF with a config": (made(with_bin("model-f16.gguf")), r"model-f16\.gguf: GGUF weights of llama\.cpp"),
    "GGML": (files("ggml-model-q4_0.bin"), r"ggml-model-q4_0\.bin: GGML weights"),
    "Meta's original": (
        files("consolidated.00.pth", "params.json", "tokenizer.model"),
        r"consolidated\.00\.pth: Meta's original weights.*; convert them with transformers' convert_llama",
    ),
    "TensorFlow": (files("tf_model.h5", "config.json"), "TensorFlow weights.*; convert"),
    "Flax": (files("flax_model.msgpack", "config.json"), "Flax weights.*; convert"),
    "ONNX": (files("model.onnx", "config.json"), "ONNX weights.*; pass the safetensors"),
    "OpenVINO": (files("openvino_model.xml", "openvino_model.bin"), "OpenVINO weights.*; pass the safetensors"),
    "GPTQ": (
        quantized(quant_method="gptq", bits=4),
        r"quantized with GPTQ \(quantization_config\); pass a checkpoint with unquantized",
    ),
    "GPTQ by its own file": (
        made(write_json("quantize_config.json", {"bits": 4})),
        r"quantize_config\.json: the weights are quantized with GPTQ; pass",
    ),
    "AWQ": (quantized(quant_method="awq", w_bit=4), r"quantized with AWQ \(quantization_config\); pass"),
    "AWQ by its own file": (
        made(write_json("quant_config.json", {"w_bit": 4})),
        r"quant_config\.json: the weights are quantized with AWQ; pass",
    ),
    "bitsandbytes": (
        quantized(quant_method="bitsandbytes", load_in_4bit=True),
        r"quantized with bitsandbytes \(quant.*\); pass",
    ),
    "quantized, without a method": (
        quantized(load_in_8bit=True),
        r"the weights are quantized \(quantization_config\); pass",
    ),
    "MLX": (
        made(config(quantization={"group_size": 64, "bits": 4})),
        r"the weights are quantized \(quantization\); pass",
    ),
    "integers": (
        made(tensors(lambda t: t.update({K_PROJ: torch.ones(64, 64, dtype=torch.int8)}))),
        "has dtype I8, expected one of F16, BF16, F32; pass an unquantized",
    ),
    "8-bit floats": (
        made(tensors(lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)}))),
        "has dtype F8_E4M3, expected",
    ),
    "weights as an LFS pointer": (
        made(overwrite("model.safetensors", LFS)),
        r"model\.safetensors: a pointer of Git LFS, not the file; run git lfs pull in",
    ),
    "tokenizer as an LFS pointer": (made(overwrite("tokenizer.model", LFS)), r"tokenizer\.model: a pointer of Git LFS"),
    "folder of the Hub's cache": (hub_cache, "a cache folder of the Hugging Face Hub; pass one of the directories in"),
    "output of a trainer": (training_output, r"config\.json: no such file; pass the directory of a Hugging Face Llama"),
    "empty directory": (Path.mkdir, r"config\.json: no such file; pass the directory"),
    "Mistral": (
        made(config(architectures=["MistralForCausalLM"], model_type="mistral")),
        r"architectures is \['MistralForCausalLM'\] .*; pass a Llama checkpoint",
    ),
    "classifier": (made(config(architectures=["LlamaForSequenceClassification"])), "architectures is .*; pass"),
    "no architecture": (made(drop("config.json", "architectures")), "architectures is None .*; pass"),
    "Llama-3's rotary scaling": (
        made(config(rope_scaling=LLAMA3_ROPE)),
        "rope_scaling is 'llama3', expected 'default'; ",
    ),
    "linear rotary scaling": (made(config(rope_scaling={"type": "linear", "factor": 2.0})), "rope_scaling is 'linear'"),
    "biases": (made(config(attention_bias=True)), "attention_bias is True, expected False; pass a plain Llama"),
    "Llama-3's tokenizer": (
        made(only_tokenizer_json(lambda d: d.update(pre_tokenizer=BYTE_LEVEL))),
        r"tokenizer\.json: has the pre-tokenizer .*ByteLevel.*; pass the tokenizer\.json or the tokenizer\.model of",
    ),
    "Unigram": (
        made(only_tokenizer_json(lambda d: d["model"].update(type="Unigram"))),
        r"tokenizer\.json: the model's type is 'Unigram', expected 'BPE'; pass the tokenizer\.json or",
    ),
    "no tokenizer": (made(remove("tokenizer.model")), r"no such file, and no tokenizer\.json; copy either from"),
    "tokenizer of another model": (made(with_tokenizer(620)), "has 620 tokens, expected at most 600, .*; copy it from"),
    "ChatML": (made(set_template(CHATML)), "the chat template is not Llama-2's.*; pass .* --allow-other-chat-template"),
    "Vicuna": (made(set_template(VICUNA)), "the chat template is not Llama-2's: .*USER: Who are you"),
    "ChatML in a file": (
        made(lambda directory: (directory / "chat_template.jinja").write_text(CHATML)),
        r"chat_template\.jinja: the chat template is not Llama-2's",
    ),
    "broken tokenizer config": (
        made(overwrite("tokenizer_config.json", b"{")),
        r"tokenizer_config\.json: not valid JSON",
    ),
    "rejected generation config": (
        made(write_json("generation_config.json", {"eos_token_id": 2, "watermarking_config": {"x": 1}})),
        r"generation_config\.json: transformers rejects it .*; correct the entry, or remove the file",
    ),
    "end outside the vocabulary": (
        made(write_json("generation_config.json", {"eos_token_id": 32000})),
        r"generation_config\.json: eos_token_id is 32000, expected an id below vocab_size, 600; set it",
    ),
    "no end": (
        made(drop("config.json", "eos_token_id"), remove("generation_config.json")),
        "eos_token_id is .*; set it",
    ),
    "short context": (
        made(context=512),
        "max_position_embeddings is 512.*; .* set --max-position-embeddings; otherwise",
    ),
    "only pickles": (made(only_pickles), "only pickle files .*; fetch the checkpoint's safetensors files, or convert"),
    "no weights": (made(remove("model.safetensors")), r"has neither model\.safetensors nor .*; fetch"),
    "missing shard": (made(remove(SECOND), shards=2), f"{SECOND}: no such file, but .*; fetch it again"),
    "interrupted download": (made(truncate(FIRST), shards=2), f"{FIRST}: not a complete safetensors file.*; fetch"),
    "weights of another size": (made(config(num_hidden_layers=3)), "tensor .* is missing; fetch the checkpoint again"),
    "no output layer": (
        made(tensors(lambda t: t.pop(HEAD))),
        rf"tensor {HEAD} .* is missing; set tie_word_embeddings to true in config\.json if .*, or fetch",
    ),
    "different tied head": (
        made(different_head, tied=True),
        f"tensor {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true .*; set it to false, or remove",
    ),
    "names of torch.compile": (
        made(renamed),
        f"tensor {EMBEDDING} of shape .* is missing; rename _orig_mod.{EMBEDDING} and the other tensors",
    ),
    "unreadable weights": (
        made(unreadable("model.safetensors")),
        r"cannot be read \(Input/output error\); let the user who runs the server read the directory and all files",
    ),
    "unreadable tokenizer": (made(unreadable("tokenizer.model")), r"cannot be read \(Input/output error\)"),
    "not a number": (
        made(tensors(lambda t: t[K_PROJ].view(-1)[7].fill_(torch.nan))),
        "contains NaN or infinity.*; fetch",
    ),
}


def make_rejected(folder: Path) -> dict[str, Path]:
    """Make all forms, and return the directory of each."""
    made_in = {name: folder / str(index) for index, name in enumerate(REJECTED)}
    for name, (form, _) in REJECTED.items():
        form(made_in[name])
    return made_in
