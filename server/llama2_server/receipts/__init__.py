"""Receipts: signed statements of what this service replied to a request."""
