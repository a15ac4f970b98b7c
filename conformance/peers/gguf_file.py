"""Convert the made checkpoint into llama.cpp's format, with the package `gguf`."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""llama.cpp's names. It stores query and key rows in another order, which the checkpoint's zeros do not show."""


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint with weights of zero in its attention as a GGUF file."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, checkpoint)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        # llama.cpp needs vectors in float32.
        writer.add_tensor(_name(name), tensor.astype(np.float32) if tensor.ndim == 1 else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    if not name.startswith("model.layers."):
        return NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}"


def _add_tokenizer(writer: Any, checkpoint: Path) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    numbers = range(tokenizer.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([tokenizer.id_to_piece(number) for number in numbers])
    writer.add_token_scores([tokenizer.get_score(number) for number in numbers])
    writer.add_token_types([_kind(tokenizer, number) for number in numbers])
    writer.add_bos_token_id(tokenizer.bos_id())
    writer.add_eos_token_id(tokenizer.eos_id())
    writer.add_unk_token_id(tokenizer.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    writer.add_chat_template(settings["chat_template"])


def _kind(tokenizer: Any, number: int) -> int:
    if tokenizer.is_unknown(number):
        return int(gguf.TokenType.UNKNOWN)
    if tokenizer.is_control(number):
        return int(gguf.TokenType.CONTROL)
    return int(gguf.TokenType.BYTE if tokenizer.is_byte(number) else gguf.TokenType.NORMAL)
