"""Mutants of idempotency keys and of streams that continue."""

import uuid
from typing import Any

from google.rpc import error_details_pb2

from conformance.mutants.behavior import GENERATION, Call, Failure, on_call, on_error, on_reply, reject
from llama2.v1 import text_generation_pb2 as pb

STREAM = "GenerateStream"


def _seen(call: Call) -> bool:
    """Remember the key of a call, and return whether an earlier call of the case has it."""
    seen: set[str] = call.state.setdefault("seen", set())
    repeated = call.request.idempotency_key in seen
    seen.add(call.request.idempotency_key)
    return repeated and call.request.HasField("idempotency_key")


def _compared(request: pb.GenerateRequest) -> bytes:
    """Return the fields that the calls of a key must have in common."""
    copy = pb.GenerateRequest.FromString(request.SerializeToString())
    for name in ("idempotency_key", "resume_after_characters", "stream", "no_cache"):
        copy.ClearField(name)
    return copy.SerializeToString()


@on_call("Generate")
def ignores_key(call: Call) -> None:
    """Generate ignores idempotency_key."""
    call.request.ClearField("idempotency_key")


@on_call(STREAM)
def stream_ignores_key(call: Call) -> None:
    """GenerateStream ignores idempotency_key."""
    if not call.request.resume_after_characters:
        call.request.ClearField("idempotency_key")


@on_call(STREAM)
def rpcs_have_their_own_keys(call: Call) -> None:
    """Generate and GenerateStream do not share keys."""
    if call.request.idempotency_key:
        call.request.idempotency_key += "s"


@on_call(GENERATION)
async def repeated_call_costs_quota(call: Call) -> None:
    """Each call with a known key costs one unit of the quota."""
    if _seen(call) and call.role == "quota":
        await call.send_another(pb.GenerateRequest(prompt="a", raw=True, max_tokens=1, no_cache=True))


@on_call(GENERATION)
def reused_key_is_served(call: Call) -> None:
    """Serves another request under a key as a new call."""
    first = call.state.setdefault(call.request.idempotency_key, _compared(call.request))
    if first != _compared(call.request) and call.role == "main":
        call.request.ClearField("idempotency_key")


@on_call(GENERATION)
def reused_key_gets_first_reply(call: Call) -> None:
    """Serves the first request under a key again instead of another one."""
    if call.request.idempotency_key and call.request.top_p <= 1 and call.role == "main":
        call.request = call.state.setdefault(call.request.idempotency_key, call.request)


@on_error()
def reused_key_without_field(call: Call, failure: Failure) -> None:
    """Does not name the field that differs under a reused key."""
    if failure.reason == "IDEMPOTENCY_KEY_REUSED":
        failure.drop_details("BadRequest")


@on_error()
def reused_key_is_invalid_request(call: Call, failure: Failure) -> None:
    """A reused key has the reason of an invalid request."""
    if failure.reason == "IDEMPOTENCY_KEY_REUSED":
        failure.change_detail(error_details_pb2.ErrorInfo, lambda info: setattr(info, "reason", "INVALID_REQUEST"))


@on_call(GENERATION)
def compares_no_cache(call: Call) -> None:
    """no_cache is part of the compared request."""
    if call.request.idempotency_key and call.request.no_cache:
        call.request.idempotency_key += "n"


@on_call(GENERATION)
def compares_stream(call: Call) -> None:
    """The field stream is part of the compared request."""
    if call.request.idempotency_key and call.request.HasField("stream"):
        call.request.idempotency_key += "s"


@on_call(GENERATION)
def accounts_share_keys(call: Call) -> None:
    """All accounts share their keys."""
    if call.request.idempotency_key and call.role == "other":
        call.use_key("main")


@on_call(GENERATION)
def cuts_keys(call: Call) -> None:
    """Uses the first 127 characters of a key."""
    if len(call.request.idempotency_key) > 127:
        call.request.idempotency_key = call.request.idempotency_key[:127]


@on_call(GENERATION)
def rejects_longest_key(call: Call) -> None:
    """Rejects a key of 128 characters."""
    if len(call.request.idempotency_key) == 128:
        reject("idempotency_key")


@on_call(GENERATION)
def accepts_any_key(call: Call) -> None:
    """Ignores a key that is not valid."""
    key = call.request.idempotency_key
    if not (1 <= len(key) <= 128 and key.isprintable()):
        call.request.ClearField("idempotency_key")


@on_call(GENERATION)
def invalid_requests_bind_keys(call: Call) -> None:
    """An invalid request binds its key."""
    invalid = call.state.setdefault("invalid", set())
    if call.request.top_p > 1:
        invalid.add(call.request.idempotency_key)
    elif call.request.idempotency_key in invalid:
        reject("top_p", "another request has the key", reason="IDEMPOTENCY_KEY_REUSED")


@on_call(STREAM)
def running_call_is_rejected(call: Call) -> None:
    """Rejects a second stream of a key."""
    if not call.request.HasField("resume_after_characters") and _seen(call):
        raise Failure("ABORTED", "the call is in progress")


@on_call(STREAM)
def cancelled_call_is_unknown(call: Call) -> None:
    """Forgets the key of a stream that did not end."""
    if _seen(call) and call.request.resume_after_characters:
        reject("", "unknown key", "FAILED_PRECONDITION", "IDEMPOTENCY_KEY_UNKNOWN")


@on_call(STREAM)
def ignores_resume(call: Call) -> None:
    """Sends the whole text instead of its rest."""
    call.request.ClearField("resume_after_characters")


@on_call(STREAM)
def resume_counts_utf_16(call: Call) -> None:
    """Counts the characters of a resumed text in UTF-16 units."""
    if call.request.prompt == "hi" and call.request.resume_after_characters > 39:  # the place of the emoji
        call.request.resume_after_characters -= 1


@on_reply(STREAM)
def resume_at_the_end_is_rejected(call: Call, reply: Any) -> None:
    """Rejects a stream that resumes at the end of its text."""
    call.memory["text"] = call.memory.get("text", "") + reply.response
    if call.request.resume_after_characters and reply.HasField("completion") and not call.memory["text"]:
        reject("resume_after_characters", "is the end of the text")


@on_call(STREAM)
def resume_beyond_the_end_is_empty(call: Call) -> None:
    """Takes the end of the text for a place beyond it."""
    if call.request.prompt == "hi" and call.request.resume_after_characters > 51:  # the length of the text
        call.request.resume_after_characters = 51


@on_call(GENERATION)
def unknown_key_is_generated(call: Call) -> None:
    """Generates a reply for an unknown key that a client resumes."""
    resumes = call.method == STREAM and call.request.resume_after_characters > 0
    if not _seen(call) and resumes and call.request.idempotency_key:
        call.request.ClearField("resume_after_characters")


@on_error()
def unknown_key_is_not_found(call: Call, failure: Failure) -> None:
    """An unknown key is NOT_FOUND."""
    if failure.reason == "IDEMPOTENCY_KEY_UNKNOWN":
        failure.code = "NOT_FOUND"


@on_call(STREAM)
def resume_needs_no_key(call: Call) -> None:
    """Ignores resume_after_characters without a key."""
    if not call.request.HasField("idempotency_key"):
        call.request.ClearField("resume_after_characters")


@on_call("Generate")
def generate_ignores_resume(call: Call) -> None:
    """Generate ignores resume_after_characters."""
    call.request.ClearField("resume_after_characters")


@on_call(STREAM)
def negative_resume_is_zero(call: Call) -> None:
    """Takes 0 for a negative resume_after_characters."""
    if call.request.resume_after_characters < 0:
        call.request.resume_after_characters = 0


@on_reply()
def repeated_reply_is_cached(call: Call, reply: Any) -> None:
    """Marks the reply of a repeated call as cached."""
    if reply.HasField("completion") and _seen(call):
        reply.completion.cached = True


@on_reply()
def repeated_reply_is_free(call: Call, reply: Any) -> None:
    """Returns the price 0 with the reply of a repeated call."""
    if reply.HasField("completion") and _seen(call):
        reply.completion.usage.neurons = "0"


@on_reply()
def repeated_reply_has_another_id(call: Call, reply: Any) -> None:
    """Returns another request id with the reply of a repeated call."""
    if reply.HasField("completion") and _seen(call):
        reply.completion.request_id = uuid.uuid4().hex
