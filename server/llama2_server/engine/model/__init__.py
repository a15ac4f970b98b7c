"""The Llama model: weights, KV cache and forward pass."""
