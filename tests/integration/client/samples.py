"""The reply of a scripted server as the client returns it, and a value for every generation option."""

from __future__ import annotations

from decimal import Decimal

from llama2.v1 import text_generation_pb2
from llama2_client import FinishReason, GenerationOptions, Reply, TokenCount

REPLY = Reply(
    text="Hello world",
    finish_reason=FinishReason.END_OF_SEQUENCE,
    input_tokens=20,
    output_tokens=13,
    reused_input_tokens=16,
    neurons=Decimal("12.1176"),
    seed=2**64 - 1,
    cached=False,
    request_id="6d1a4a7d1f3e4c0e9a3b5c7d9e1f2a3b",
    fingerprint="f0" * 32,
    queue_time_seconds=0.25,
    time_to_first_token_seconds=0.5,
    total_time_seconds=2.0,
)

TOKEN_COUNT = TokenCount(
    input_tokens=20,
    max_output_tokens=2500,
    max_neurons=Decimal("101.3472"),
    requests_left=3,
    estimated_queue_time_seconds=4.5,
)

EVERY_OPTION = GenerationOptions(
    max_tokens=7,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    seed=2**64 - 1,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.0,
    stop=("\n", "END"),
    no_cache=False,
)

# The request for the prompt "Hi" with these options.
EVERY_OPTION_REQUEST = text_generation_pb2.GenerateRequest(
    prompt="Hi",
    max_tokens=7,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    seed=2**64 - 1,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.0,
    stop=["\n", "END"],
    no_cache=False,
)
