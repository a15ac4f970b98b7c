"""Validation of requests: the card's schema, then the rules that a schema cannot express."""
