"""Run the model: torch and token ids; no gRPC, no asyncio, no settings."""
