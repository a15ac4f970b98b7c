"""Models with random weights, created on the device: nothing is downloaded, and speed does not depend on the values."""

import torch

from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.weights import LlamaConfig, LlamaWeights

INITIALIZER_RANGE = 0.02  # the default of transformers
SHAPES = {
    # config.json of meta-llama/Llama-2-7b-chat-hf.
    "7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=4096,
        tied_embeddings=False,
    ),
    # For testing the benchmark itself, even on a CPU.
    "tiny": LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=176,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=4096,
        tied_embeddings=False,
    ),
}


def random_weights(
    config: LlamaConfig, device: str, dtype: torch.dtype = torch.float16, seed: int = 0
) -> LlamaWeights[torch.Tensor]:
    """Return weights with normally distributed matrices and with norms of 1."""
    weights = LlamaWeights.allocate(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for table in (weights.embedding, weights.head, *_matrices(weights)):
        table.normal_(0, INITIALIZER_RANGE, generator=generator)
    for norm in (weights.norm, *(norm for layer in weights.layers for norm in (layer.attention_norm, layer.mlp_norm))):
        norm.fill_(1)
    return weights


def random_model(shape: str, device: str, *, slots: int, context_length: int) -> LlamaModel:
    """Return a float16 model with one of SHAPES."""
    config = SHAPES[shape]
    return LlamaModel(config, random_weights(config, device), context_length=context_length, slots=slots)


def weight_bytes_per_token(config: LlamaConfig) -> int:
    """Return the bytes of float16 weights that a decode step reads: all, but only one row of the embedding."""
    layer = config.hidden_size * (2 * config.query_size + 2 * config.kv_size + 3 * config.intermediate_size)
    norms = (2 * config.layers + 1) * config.hidden_size
    return 2 * (config.layers * layer + norms + config.hidden_size * config.vocab_size)


def weight_bytes(config: LlamaConfig) -> int:
    """Return the bytes of all float16 weights."""
    return weight_bytes_per_token(config) + 2 * config.hidden_size * config.vocab_size


def cache_bytes_per_token(config: LlamaConfig) -> int:
    """Return the bytes of float16 keys and values of one token."""
    return 2 * 2 * config.layers * config.kv_size


def multiplications_per_token(config: LlamaConfig) -> int:
    """Return the multiplications in the matrices of the layers; the logits are computed once per prompt."""
    return (
        config.layers * config.hidden_size * (2 * config.query_size + 2 * config.kv_size + 3 * config.intermediate_size)
    )


def _matrices(weights: LlamaWeights[torch.Tensor]) -> list[torch.Tensor]:
    return [matrix for layer in weights.layers for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)]
