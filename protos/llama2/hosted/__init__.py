"""The HTTP API of the former host of the model."""
