"""Make a small Llama checkpoint that says the texts of `script` under every implementation of Llama.

All attention and feed-forward weights are zero, so a token's embedding alone determines the logits. The embedding is a
one-hot code. The output matrix maps each code to the successor, with a logit that no valid sampling parameter can
outweigh.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from safetensors.numpy import save_file

from conformance.service import script

WIDTH = 256
FEED_FORWARD_WIDTH = 640
CONTEXT_LENGTH = 3072
SCALE = WIDTH**0.5
"""The only non-zero element of a normalized hidden state."""
CERTAIN = 40.0
"""Output weight of a certain successor: a logit of 640, or 128 at the highest temperature."""
TOKENIZER = Path(__file__).with_name("tokenizer")
"""A SentencePiece tokenizer of 2,560 pieces with Llama-2's settings. The cases count its tokens."""
CONFIGURATION: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": FEED_FORWARD_WIDTH,
    "max_position_embeddings": CONTEXT_LENGTH,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": WIDTH // 64,
    "num_hidden_layers": 1,
    "num_key_value_heads": WIDTH // 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}


def make_checkpoint(folder: Path) -> None:
    """Write the checkpoint into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    save_file(_tensors(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})
    config = CONFIGURATION | {"vocab_size": tokenizer.vocab_size()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder / path.name)


def _tensors(tokenizer: sentencepiece.SentencePieceProcessor) -> dict[str, NDArray[np.float16]]:
    vocab_size = tokenizer.vocab_size()
    embedding, output = _embedding_and_output(tokenizer, vocab_size)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": output}
    layer = "model.layers.0"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"{layer}.self_attn.{name}.weight"] = np.zeros((WIDTH, WIDTH))
    for name in ("gate_proj", "up_proj"):
        tensors[f"{layer}.mlp.{name}.weight"] = np.zeros((FEED_FORWARD_WIDTH, WIDTH))
    tensors[f"{layer}.mlp.down_proj.weight"] = np.zeros((WIDTH, FEED_FORWARD_WIDTH))
    for name in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = np.ones(WIDTH)
    return {name: np.ascontiguousarray(tensor, dtype=np.float16) for name, tensor in tensors.items()}


def _embedding_and_output(
    tokenizer: sentencepiece.SentencePieceProcessor, vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both matrices, (vocab_size, WIDTH) each; code 0 is every token without a successor."""
    successors = script.successors()
    codes = {token: code for code, token in enumerate([*successors, *(fork.trigger for fork in script.FORKS)], 1)}
    if len(codes) >= WIDTH:
        raise ValueError(f"script: has {len(codes)} tokens; at most {WIDTH - 1} are possible")
    embedding, output = np.zeros((vocab_size, WIDTH)), np.zeros((vocab_size, WIDTH))
    embedding[:, 0] = 1
    for token, code in codes.items():
        embedding[_token_id(tokenizer, token)] = np.eye(WIDTH)[code]
    output[_token_id(tokenizer, script.END), 0] = CERTAIN
    for token, following in successors.items():
        output[_token_id(tokenizer, following), codes[token]] = CERTAIN
    for fork in script.FORKS:
        output[:, codes[fork.trigger]] = -CERTAIN / 10
        output[_token_id(tokenizer, fork.likely), codes[fork.trigger]] = fork.likely_logit / SCALE
        output[_token_id(tokenizer, fork.unlikely), codes[fork.trigger]] = fork.unlikely_logit / SCALE
    return embedding, output


def _token_id(tokenizer: sentencepiece.SentencePieceProcessor, piece: str) -> int:
    found = int(tokenizer.piece_to_id(piece))
    if found == tokenizer.unk_id():
        raise ValueError(f"script: the tokenizer has no token {piece}; use another word")
    return found
