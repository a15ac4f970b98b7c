"""Mutants that change the course of calls: accounts, queue, cancellation, cache and encoding."""

import asyncio

from conformance.mutants.behavior import GENERATION, MUTANTS, Call, Failure, on_call, reject
from llama2.v1 import text_generation_pb2 as pb

EVERY_LLAMA2_METHOD = "Generate GenerateStream CountTokens GetUsage GetModelCard"


@on_call("Generate GenerateStream CountTokens GetUsage")
def accepts_missing_key(call: Call) -> None:
    """Serves calls without a key."""
    if call.role == "none":
        call.use_key("main")


@on_call("Generate GenerateStream CountTokens GetUsage")
def accepts_unknown_key(call: Call) -> None:
    """Serves calls with an unknown key."""
    if call.role == "unknown":
        call.use_key("main")


@on_call()
def uses_last_of_two_keys(call: Call) -> None:
    """Serves calls with two keys."""
    if len([key for key, _ in call.metadata if key == "authorization"]) == 2:
        call.use_key("main")


@on_call()
def accepts_basic(call: Call) -> None:
    """Serves calls with HTTP's scheme Basic."""
    if any(str(value).startswith("Basic") for _, value in call.metadata):
        call.use_key("main")


@on_call()
def accepts_disabled(call: Call) -> None:
    """Serves calls of a disabled account."""
    if call.role == "disabled":
        call.use_key("main")


@on_call(GENERATION)
def validates_before_authentication(call: Call) -> None:
    """Rejects an invalid request before it looks at the key."""
    if call.request.top_p > 1 and call.role == "none":
        reject("top_p")


@on_call("GetModelCard")
def card_needs_key(call: Call) -> None:
    """Needs a key for the card."""
    if call.role == "none":
        raise Failure("UNAUTHENTICATED", "a key is required")


@on_call(GENERATION)
def no_quota(call: Call) -> None:
    """Applies no quota."""
    if call.role == "quota":
        call.use_key("main")


@on_call()
async def invalid_requests_cost_quota(call: Call) -> None:
    """Counts invalid requests and CountTokens in the quota."""
    if call.role == "quota" and (call.method == "CountTokens" or call.request.top_p > 1):
        await call.send_another(pb.GenerateRequest(prompt="a", raw=True))


@on_call(GENERATION)
def one_quota_for_all(call: Call) -> None:
    """Counts all accounts in one quota."""
    if call.role == "quota":
        call.share_key()


@on_call(EVERY_LLAMA2_METHOD)
def one_account(call: Call) -> None:
    """Takes all keys for one account."""
    if call.role == "other":
        call.use_key("main")


@on_call("Generate")
def rejects_short_deadlines(call: Call) -> None:
    """Rejects calls with a short deadline at once."""
    if call.timeout is not None and call.timeout < 0.2:
        raise Failure("UNAVAILABLE", "the deadline is too short")


@on_call("Generate")
def rejects_deadlines_in_queue(call: Call) -> None:
    """Estimates the wait at twenty seconds."""
    if call.timeout is not None and 10 < call.timeout < 18:
        raise Failure("RESOURCE_EXHAUSTED", "the wait would be too long")


@on_call("GenerateStream")
def ignores_deadline(call: Call) -> None:
    """Generates after the deadline."""
    if call.timeout is not None and call.timeout < 1:
        call.timeout, call.drain_when_cancelled = None, True


@on_call("GenerateStream")
def ignores_cancelled_streams(call: Call) -> None:
    """Generates the whole text of a cancelled stream."""
    call.drain_when_cancelled = True


@on_call("Generate")
def ignores_cancelled_generate(call: Call) -> None:
    """Generates the whole text of a cancelled Generate."""
    call.drain_when_cancelled = True


@on_call("CountTokens GetModelCard")
async def counting_needs_slot(call: Call) -> None:
    """Waits for a slot before it counts."""
    if call.role == "main" and len(call.request.SerializeToString()) < 100:
        await call.send_another(pb.GenerateRequest(prompt="a", raw=True, max_tokens=1, no_cache=True))


@on_call(GENERATION)
async def slow_reader_holds_slot(call: Call) -> None:
    """Holds the slot of a long stream until it is read."""
    if call.state.get("long"):
        await asyncio.sleep(7)
    call.state["long"] = call.method == "GenerateStream" and call.request.max_tokens == 2400


@on_call(GENERATION)
def continues_cancelled_reply(call: Call) -> None:
    """Starts the next reply at the place at which a cancelled one ended."""
    prompt = call.request.prompt
    if call.state.get("prompt") == prompt == "either":
        call.request.prompt = "left"
    call.state["prompt"] = prompt if call.method == "GenerateStream" else None


@on_call(GENERATION)
def no_cache_at_all(call: Call) -> None:
    """Never uses the cache."""
    call.request.no_cache = True


@on_call(GENERATION)
def ignores_no_cache(call: Call) -> None:
    """Uses the cache in spite of no_cache."""
    if call.request.prompt.startswith("tell"):
        call.request.ClearField("no_cache")


def _cache_ignoring(name: str, *fields: str) -> None:
    def ignore(call: Call) -> None:
        if call.request.prompt.startswith("tell"):
            for field in fields:
                call.request.ClearField(field)

    ignore.__name__, ignore.__doc__ = name, f"Ignores {', '.join(fields)} in the key of the cache."
    on_call(GENERATION)(ignore)


_cache_ignoring("cache_ignores_seed", "seed")
_cache_ignoring("cache_ignores_parameters", "max_tokens", "temperature", "stop", "top_k")


@on_call("GenerateStream")
def streams_are_not_cached(call: Call) -> None:
    """Does not use the cache for streams."""
    call.request.no_cache = True


@on_call(GENERATION)
def rejects_unknown_metadata(call: Call) -> None:
    """Rejects unknown metadata."""
    if any(key == "x-unknown" for key, _ in call.metadata):
        raise Failure("INVALID_ARGUMENT", "unknown metadata")


@on_call("Generate CountTokens")
def no_compression(call: Call) -> None:
    """Accepts no compressed messages."""


# The hook changes nothing: the server of this mutant lacks gzip.
MUTANTS["no_compression"] = MUTANTS["no_compression"].__class__(
    "no_compression",
    MUTANTS["no_compression"].behavior,
    frozenset(),
    server_options=(("grpc.compression_enabled_algorithms_bitset", 1),),
)
