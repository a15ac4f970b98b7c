"""Equivalence at scale: generated JSON bodies, the card's schema against the service."""
