"""The Llama forward pass: weights, KV cache and layers."""
