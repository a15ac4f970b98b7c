"""The model engine: torch and token ids; no gRPC, no asyncio, no settings."""
