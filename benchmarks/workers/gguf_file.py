"""A converter from a Hugging Face checkpoint to a 16-bit GGUF file, the format of llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.workers.protocol import Setup

FILE_TYPES = {"F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GLOBAL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_of(setup: Setup) -> Path:
    """Return the file of a checkpoint in the folder of the setup; write it if it does not exist yet."""
    path = Path(setup.folder) / f"{setup.arithmetic}.gguf"
    if not path.exists():
        unfinished = path.with_suffix(".part")
        write_gguf(Path(setup.checkpoint), unfinished, setup.arithmetic)
        unfinished.replace(path)
    return path


def write_gguf(checkpoint: Path, path: Path, arithmetic: str) -> None:
    """Write float16 weights unchanged ("F16") or rounded to bfloat16 ("BF16")."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta") or 10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[arithmetic])
    _add_vocabulary(writer, checkpoint, config["vocab_size"])
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = _permuted(tensor, heads if "q_proj" in name else kv_heads, name)
            _add_tensor(writer, _gguf_name(name), values, arithmetic)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: Any, name: str, values: NDArray[Any], arithmetic: str) -> None:
    if values.ndim == 1:  # norms are float32 in every GGUF file
        writer.add_tensor(name, values.astype(np.float32))
    elif arithmetic == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)


def _add_vocabulary(writer: Any, checkpoint: Path, vocab_size: int) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    kinds = {pieces.unk_id(): gguf.TokenType.UNKNOWN, pieces.bos_id(): gguf.TokenType.CONTROL}
    kinds[pieces.eos_id()] = gguf.TokenType.CONTROL
    known = range(pieces.get_piece_size())
    padding = range(pieces.get_piece_size(), vocab_size)
    writer.add_tokenizer_model("llama")
    texts = [pieces.id_to_piece(index).encode() for index in known] + [f"<pad{index}>".encode() for index in padding]
    writer.add_token_list(texts)
    writer.add_token_scores([pieces.get_score(index) for index in known] + [0.0 for _ in padding])
    bytes_or_normal = [
        kinds.get(index, gguf.TokenType.BYTE if pieces.is_byte(index) else gguf.TokenType.NORMAL) for index in known
    ]
    writer.add_token_types(bytes_or_normal + [gguf.TokenType.UNUSED for _ in padding])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())


def _gguf_name(name: str) -> str:
    """Return the name of a tensor in GGUF."""
    stem = name.removesuffix(".weight")
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def _permuted(tensor: NDArray[Any], heads: int, name: str) -> NDArray[Any]:
    """Reorder query and key weights for llama.cpp's rotary embedding, which interleaves pairs instead of halves."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
