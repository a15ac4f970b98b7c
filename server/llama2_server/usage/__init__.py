"""Tokens to neurons to durable usage records."""
