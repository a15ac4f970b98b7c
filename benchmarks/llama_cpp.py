"""llama.cpp as a peer: the same weights, written as a GGUF file in float16, on the same number of threads.

Optional, because it compiles for minutes:  pip install llama-cpp-python==0.3.36 gguf==0.19.0
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece
from safetensors.torch import load_file
from torch import Tensor

from llama2_server.engine.checkpoint import read_config

NAMES = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def installed() -> bool:
    """Whether it can take part."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


class LlamaCpp:
    """A checkpoint in llama.cpp, greedy."""

    def __init__(self, checkpoint: Path, folder: Path, context_length: int) -> None:
        import llama_cpp

        path = folder / "model.gguf"
        _write_gguf(checkpoint, path)
        threads = os.cpu_count()
        self._model: Any = llama_cpp.Llama(
            str(path), n_ctx=context_length, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False
        )

    def begin(self, prompt_ids: list[int]) -> int:
        """Prefill; the first token."""
        self._model.reset()
        return self.go_on(*prompt_ids)

    def go_on(self, *token_ids: int) -> int:
        """The token after these."""
        self._model.eval(token_ids)
        return int(self._model.sample(temp=0.0))


def _write_gguf(checkpoint: Path, path: Path) -> None:
    import gguf

    config = read_config(checkpoint)
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, checkpoint, config.vocab_size)
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            theirs = _name(name)
            values = _permuted(tensor, config.heads if "q_proj" in name else config.kv_heads, name)
            # Norms are float32 in every GGUF file.
            writer.add_tensor(theirs, (values.float() if values.ndim == 1 else values.half()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, checkpoint: Path, vocab_size: int) -> None:
    import gguf

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


def _name(name: str) -> str:
    """A tensor's name in GGUF."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"} | NAMES
    return f"blk.{layer}.{short[part]}.weight"


def _permuted(tensor: Tensor, heads: int, name: str) -> Tensor:
    """Queries and keys in the order of llama.cpp's rotary embedding: pairs side by side, not in halves."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
