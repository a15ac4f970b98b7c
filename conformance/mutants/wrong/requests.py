"""Mutants that accept requests which the contract rejects, or reject requests which it accepts."""

import math
from typing import Any

from conformance.mutants.behavior import GENERATION, Call, on_call, reject

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
ROLES = ("system", "user", "assistant")


def _clamp(call: Call, name: str, low: float, high: float) -> None:
    if call.request.HasField(name):
        value = getattr(call.request, name)
        setattr(call.request, name, type(value)(min(high, max(low, value))))


@on_call()
def ignores_system_message(call: Call) -> None:
    """Drops the system message."""
    if len(call.request.messages) > 1 and call.request.messages[0].role == "system":
        del call.request.messages[0]


@on_call()
def forgets_conversation(call: Call) -> None:
    """Replies to the last message only."""
    if len(call.request.messages) > 2 and all(message.role in ROLES for message in call.request.messages):
        del call.request.messages[:-1]


@on_call()
def rejects_stream_false(call: Call) -> None:
    """Rejects `stream: false` with Generate."""
    if call.method == "Generate" and call.request.HasField("stream") and not call.request.stream:
        reject("stream")


@on_call("GenerateStream")
def rejects_stream_true(call: Call) -> None:
    """Rejects `stream: true` with GenerateStream."""
    if call.request.stream:
        reject("stream")


@on_call(GENERATION)
def ignores_stream_field(call: Call) -> None:
    """Accepts every value of `stream`."""
    call.request.ClearField("stream")


@on_call()
def rejects_empty_text(call: Call) -> None:
    """Rejects empty prompts and contents."""
    if call.request.HasField("prompt") and not call.request.prompt and not call.request.raw:
        reject("prompt")
    if any(message.HasField("content") and not message.content for message in call.request.messages):
        reject("messages[0].content")


@on_call()
def max_length_off_by_one(call: Call) -> None:
    """Rejects texts of 4096 characters."""
    if any(len(text) == 4096 and len(text.encode()) == 4096 and " " in text for text in call.texts):
        reject("prompt")


@on_call()
def counts_utf_16(call: Call) -> None:
    """Counts UTF-16 units instead of code points."""
    if any(len(text) <= 4096 < len(text.encode("utf-16-le")) // 2 for text in call.texts):
        reject("prompt", "must have at most 4096 characters")


@on_call()
def cuts_long_texts(call: Call) -> None:
    """Cuts texts after 4096 characters instead of rejecting them."""
    call.change_texts(lambda text: text[:4096])


@on_call(GENERATION)
def cuts_to_context(call: Call) -> None:
    """Cuts the beginning of prompts that do not fit the context."""
    call.change_texts(lambda text: text[-900:])


@on_call()
def rejects_tags_in_raw(call: Call) -> None:
    """Rejects control tags in raw prompts."""
    if call.request.raw and any(tag in call.request.prompt for tag in TAGS):
        reject("prompt")


@on_call()
def strips_tags(call: Call) -> None:
    """Removes control tags instead of rejecting them."""

    def without_tags(text: str) -> str:
        for tag in TAGS:
            text = text.replace(tag, "")
        return text

    if not call.request.raw:
        call.change_texts(without_tags)


@on_call()
def rejects_raw_false_with_messages(call: Call) -> None:
    """Rejects `raw: false` with messages."""
    if call.request.messages and call.request.HasField("raw") and not call.request.raw:
        reject("raw")


@on_call()
def ignores_raw_with_messages(call: Call) -> None:
    """Ignores `raw: true` with messages."""
    if call.request.messages:
        call.request.ClearField("raw")


@on_call()
def accepts_no_text(call: Call) -> None:
    """Replies to a request without prompt and messages."""
    if not call.request.HasField("prompt") and not call.request.messages:
        call.request.prompt = ""


@on_call()
def prefers_prompt(call: Call) -> None:
    """Ignores the messages next to a prompt."""
    if call.request.HasField("prompt"):
        del call.request.messages[:]


@on_call()
def fills_missing_fields(call: Call) -> None:
    """Takes `user` for a missing role, and empty text for missing content."""
    for message in call.request.messages:
        message.role = message.role if message.HasField("role") else "user"
        message.content = message.content if message.HasField("content") else ""


@on_call()
def unknown_role_is_user(call: Call) -> None:
    """Takes every unknown role for `user`."""
    for message in call.request.messages:
        if message.HasField("role") and message.role not in ROLES:
            message.role = "user"


@on_call()
def repairs_order(call: Call) -> None:
    """Accepts any order of roles."""
    if all(message.role in ROLES for message in call.request.messages) and call.request.messages:
        call.request.messages[-1].role = "user"
        del call.request.messages[:-1]


@on_call(GENERATION)
def raises_max_tokens(call: Call) -> None:
    """Takes 1 for a lower max_tokens."""
    _clamp(call, "max_tokens", 1, math.inf) if call.request.max_tokens < 1 else None


@on_call(GENERATION)
def lowers_max_tokens(call: Call) -> None:
    """Takes 2500 for a higher max_tokens."""
    _clamp(call, "max_tokens", -math.inf, 2500) if call.request.max_tokens > 2500 else None


@on_call("Generate")
def rejects_full_sequence(call: Call) -> None:
    """Rejects max_tokens 2500 in Generate."""
    if call.request.max_tokens == 2500:
        reject("max_tokens")


@on_call("GenerateStream")
def stream_max_tokens_off_by_one(call: Call) -> None:
    """Streams one more token than max_tokens."""
    if 1 <= call.request.max_tokens < 100:
        call.request.max_tokens += 1


@on_call(GENERATION)
def other_default_max_tokens(call: Call) -> None:
    """Generates 128 tokens without max_tokens."""
    if not call.request.HasField("max_tokens") and len(call.request.prompt) < 3000:
        call.request.max_tokens = 128


def _clamping(name: str, low: float, high: float, what: str) -> None:
    def clamp(call: Call) -> None:
        _clamp(call, name, low, high)

    clamp.__name__, clamp.__doc__ = f"clamps_{name}", f"Takes the nearest valid {what} for one out of range."
    on_call(GENERATION)(clamp)


def _ignoring(name: str, behavior: str) -> None:
    def ignore(call: Call) -> None:
        call.request.ClearField(name)

    ignore.__name__, ignore.__doc__ = f"ignores_{name}", behavior
    on_call(GENERATION)(ignore)


_clamping("temperature", 0, 5, "temperature")
_clamping("top_p", 0.0001, 1, "top_p")
_clamping("top_k", 0, 2**31 - 1, "top_k")
_clamping("repetition_penalty", 0.01, 2, "repetition_penalty")
_clamping("frequency_penalty", -2, 2, "frequency_penalty")
_clamping("presence_penalty", -2, 2, "presence_penalty")
_ignoring("top_p", "Ignores top_p.")
_ignoring("top_k", "Ignores top_k.")
_ignoring("presence_penalty", "Ignores presence_penalty.")
_ignoring("frequency_penalty", "Ignores frequency_penalty.")
_ignoring("repetition_penalty", "Ignores repetition_penalty.")
_ignoring("seed", "Ignores the seed.")
_ignoring("stop", "Ignores the stop sequences.")


@on_call(GENERATION)
def accepts_not_finite(call: Call) -> None:
    """Takes the default for a temperature that is not finite."""
    if not math.isfinite(call.request.temperature):
        call.request.ClearField("temperature")


def _rejecting(name: str, value: Any, behavior: str) -> None:
    def check(call: Call) -> None:
        if call.request.HasField(name) and getattr(call.request, name) == value:
            reject(name)

    check.__name__, check.__doc__ = f"rejects_{name}_{value}".replace(".", "_").replace("-", "minus_"), behavior
    on_call(GENERATION)(check)


_rejecting("temperature", 5.0, "Rejects temperature 5.")
_rejecting("top_p", 1.0, "Rejects top_p 1.")
_rejecting("top_k", 0, "Rejects top_k 0.")
_rejecting("repetition_penalty", 2.0, "Rejects repetition_penalty 2.")
_rejecting("frequency_penalty", -2.0, "Rejects frequency_penalty -2.")
_rejecting("presence_penalty", -2.0, "Rejects presence_penalty -2.")


@on_call(GENERATION)
def never_greedy(call: Call) -> None:
    """Samples at temperature 0."""
    if call.request.HasField("temperature") and call.request.temperature == 0:
        call.request.temperature = 0.6


@on_call(GENERATION)
def greedy_by_default(call: Call) -> None:
    """Selects the most likely token without a temperature."""
    if not call.request.HasField("temperature"):
        call.request.temperature = 0


@on_call(GENERATION)
def one_seed(call: Call) -> None:
    """Uses the same seed for every request."""
    call.request.seed = 5


@on_call("GenerateStream")
def stream_has_another_seed(call: Call) -> None:
    """Streams with the next seed."""
    if call.request.HasField("seed"):
        call.request.seed = (call.request.seed + 1) % 2**64


@on_call(GENERATION)
def first_stop_only(call: Call) -> None:
    """Uses only the first stop sequence."""
    del call.request.stop[1:]


@on_call(GENERATION)
def stops_at_token_boundaries(call: Call) -> None:
    """Ignores stop sequences that do not start with a space."""
    kept = [stop for stop in call.request.stop if stop.startswith(" ") or not stop or len(stop) > 256]
    if len(call.request.stop) == 1:
        call.request.stop[:] = kept


@on_call("GetUsage")
def ignores_dates(call: Call) -> None:
    """Ignores `since` and `until`."""
    call.request.Clear()
