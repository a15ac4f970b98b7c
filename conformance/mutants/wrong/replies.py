"""Mutants that change replies."""

from decimal import Decimal
from typing import Any

from conformance.mutants.behavior import GENERATION, Call, on_reply
from llama2.v1 import text_generation_pb2 as pb

END, STOP, MAX = 1, 2, 3


@on_reply()
def counts_stripped_space(call: Call, reply: Any) -> None:
    """Counts the white space around a message."""
    if any(message.content != message.content.strip() for message in call.request.messages) and reply.HasField(
        "completion"
    ):
        reply.completion.usage.input_tokens += 3


@on_reply()
def space_before_chat_reply(call: Call, reply: Any) -> None:
    """Sends a space before the reply to messages."""
    if call.request.messages and not call.memory.setdefault("seen", False):
        call.memory["seen"] = True
        reply.response = " " + reply.response


@on_reply()
def merges_spaces(call: Call, reply: Any) -> None:
    """Merges spaces."""
    reply.response = reply.response.replace("  ", " ")


@on_reply()
def drops_control_characters(call: Call, reply: Any) -> None:
    """Drops newlines and tabs."""
    reply.response = "".join(character for character in reply.response if character >= " ")


def _breaks_characters(size: int) -> None:
    def break_characters(call: Call, reply: Any) -> None:
        starts = reply.response[:1].strip()
        if call.request.raw and len(starts.encode()) == size:
            reply.response = "\ufffd" * size + reply.response[1:]

    break_characters.__name__ = f"breaks_characters_of_{size}_bytes"
    break_characters.__doc__ = f"Replaces each byte of a character of {size} bytes."
    on_reply()(break_characters)


for _size in (2, 3, 4):
    _breaks_characters(_size)


@on_reply("GenerateStream")
def splits_characters(call: Call, reply: Any) -> list[Any] | None:
    """Streams a part of a character as a replacement character."""
    before, found, after = reply.response.partition("😀")
    if not found:
        return None
    first = pb.GenerateStreamResponse(response=before + "\ufffd")
    reply.response = "\ufffd" + after
    return [first, reply]


@on_reply()
def drops_invalid_bytes(call: Call, reply: Any) -> None:
    """Drops bytes outside of characters."""
    reply.response = reply.response.replace("\ufffd", "")


@on_reply("GenerateStream")
def drops_second_message(call: Call, reply: Any) -> list[Any] | None:
    """Loses the second message of a stream."""
    call.memory["seen"] = call.memory.get("seen", 0) + 1
    return [] if call.memory["seen"] == 2 and not reply.HasField("completion") else None


@on_reply("GenerateStream")
def loses_end_of_long_streams(call: Call, reply: Any) -> None:
    """Loses the text of a stream after 8,000 characters."""
    seen = call.memory.get("seen", 0)
    call.memory["seen"] = seen + len(reply.response)
    reply.response = reply.response[: max(0, 8000 - seen)]


@on_reply("GenerateStream")
def does_not_stream(call: Call, reply: Any) -> list[Any]:
    """Sends the whole text in the last message."""
    call.memory["seen"] = call.memory.get("seen", "") + reply.response
    reply.response = call.memory["seen"]
    return [reply] if reply.HasField("completion") else []


@on_reply("GenerateStream")
def completion_in_first(call: Call, reply: Any) -> None:
    """Sends a completion in every message."""
    reply.completion.cached = reply.completion.cached


@on_reply("GenerateStream")
def message_after_completion(call: Call, reply: Any) -> list[Any] | None:
    """Sends an empty message after the completion of a short reply without an idempotency key."""
    keyed = call.request.HasField("idempotency_key")
    short = reply.HasField("completion") and reply.completion.usage.output_tokens < 100
    return [reply, pb.GenerateStreamResponse()] if short and not keyed else None


@on_reply("GenerateStream")
def empty_deltas(call: Call, reply: Any) -> list[Any]:
    """Sends messages without text."""
    return [pb.GenerateStreamResponse(), reply]


@on_reply("GenerateStream")
def no_message_without_text(call: Call, reply: Any) -> list[Any] | None:
    """Sends no message for an empty reply."""
    return [] if not reply.response and reply.completion.usage.output_tokens == 1 else None


@on_reply("Generate")
def raw_ends_at_max_tokens(call: Call, reply: Any) -> None:
    """Returns MAX_TOKENS for each raw reply."""
    if call.request.raw and not call.request.stop:
        reply.completion.finish_reason = MAX


@on_reply("Generate")
def chat_finish_unset(call: Call, reply: Any) -> None:
    """Returns no finish reason for the reply to a chat prompt."""
    if not call.request.raw:
        reply.completion.finish_reason = 0


@on_reply()
def finish_stop_with_stops(call: Call, reply: Any) -> None:
    """Returns STOP_SEQUENCE for each request with stop sequences."""
    if call.request.stop and reply.HasField("completion"):
        reply.completion.finish_reason = STOP


@on_reply()
def finish_end_for_stops(call: Call, reply: Any) -> None:
    """Returns END_OF_SEQUENCE instead of STOP_SEQUENCE."""
    if reply.completion.finish_reason == STOP:
        reply.completion.finish_reason = END


@on_reply()
def finish_end_for_max_tokens(call: Call, reply: Any) -> None:
    """Returns END_OF_SEQUENCE instead of MAX_TOKENS."""
    if reply.completion.finish_reason == MAX:
        reply.completion.finish_reason = END


@on_reply()
def sends_stop_sequence(call: Call, reply: Any) -> None:
    """Sends the stop sequence."""
    if reply.completion.finish_reason == STOP:
        reply.response += call.request.stop[-1]


@on_reply()
def holds_beginning_of_stop(call: Call, reply: Any) -> None:
    """Never sends the beginning of a stop sequence at the end of a reply."""
    for stop in call.request.stop if reply.HasField("completion") else ():
        for length in range(len(stop), 0, -1):
            if reply.response.endswith(stop[:length]):
                reply.response = reply.response[:-length]


@on_reply("Generate")
def searches_prompt_for_stops(call: Call, reply: Any) -> None:
    """Searches the prompt for stop sequences."""
    if any(stop in call.request.prompt for stop in call.request.stop):
        reply.response, reply.completion.finish_reason = "", STOP


@on_reply()
def end_is_not_counted(call: Call, reply: Any) -> None:
    """Does not count the end-of-sequence token."""
    if reply.completion.finish_reason == END:
        reply.completion.usage.output_tokens -= 1


@on_reply()
def last_token_is_not_counted(call: Call, reply: Any) -> None:
    """Counts one token less for a reply that reaches max_tokens."""
    if reply.completion.finish_reason == MAX:
        reply.completion.usage.output_tokens -= 1


@on_reply()
def beginning_is_not_counted(call: Call, reply: Any) -> None:
    """Does not count the beginning-of-sequence token."""
    if reply.HasField("completion"):
        reply.completion.usage.input_tokens -= 1


@on_reply()
def rounds_price(call: Call, reply: Any) -> None:
    """Rounds the price to two digits."""
    if reply.HasField("completion"):
        reply.completion.usage.neurons = str(round(Decimal(reply.completion.usage.neurons), 2))


@on_reply()
def charges_cached(call: Call, reply: Any) -> None:
    """Charges a cached reply."""
    if reply.completion.cached:
        usage = reply.completion.usage
        usage.neurons = str(Decimal("0.3672") * (usage.input_tokens + usage.output_tokens))


@on_reply()
def seed_as_double(call: Call, reply: Any) -> None:
    """Returns the seed with 53 bits."""
    if reply.HasField("completion"):
        reply.completion.seed = min(int(float(reply.completion.seed)), 2**64 - 1) & ~1


@on_reply()
def never_marks_cached(call: Call, reply: Any) -> None:
    """Never marks a reply as cached."""
    if reply.HasField("completion"):
        reply.completion.cached = False


@on_reply()
def always_marks_cached(call: Call, reply: Any) -> None:
    """Marks every reply as cached."""
    if reply.HasField("completion"):
        reply.completion.cached = True


@on_reply()
def cached_has_first_request_id(call: Call, reply: Any) -> None:
    """Returns the request id of the first reply with a cached one."""
    if reply.HasField("completion"):
        first = call.state.setdefault("id", reply.completion.request_id)
        reply.completion.request_id = first


@on_reply()
def cached_has_another_seed(call: Call, reply: Any) -> None:
    """Returns another seed with a cached reply."""
    if reply.completion.cached:
        reply.completion.seed ^= 1


@on_reply()
def no_request_id(call: Call, reply: Any) -> None:
    """Returns no request id."""
    if reply.HasField("completion"):
        reply.completion.request_id = ""


@on_reply()
def no_timings(call: Call, reply: Any) -> None:
    """Returns no durations."""
    if reply.HasField("completion"):
        reply.completion.ClearField("timings")


@on_reply()
def no_queue_time(call: Call, reply: Any) -> None:
    """Returns no time in the queue."""
    if reply.HasField("completion"):
        reply.completion.timings.ClearField("queue_time")


@on_reply(GENERATION)
def context_off_by_one(call: Call, reply: Any) -> None:
    """Generates one token less if the context is full."""
    usage = reply.completion.usage
    if usage.input_tokens + usage.output_tokens == 3072:
        usage.output_tokens -= 1
