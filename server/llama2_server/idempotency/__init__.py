"""Calls with an idempotency key: repeated calls are one call, and broken streams continue."""
