"""Idempotency keys: which request used a key, and what its reply cost."""
