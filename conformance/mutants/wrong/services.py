"""Mutants of counting, card, usage, health, reflection and of the bytes of messages."""

from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from conformance.mutants.behavior import Call, Failure, on_call, on_data, on_error, on_reply, reject
from llama2.v1 import text_generation_pb2 as pb

CARD, USAGE, COUNT = "GetModelCard", "GetUsage", "CountTokens"


@on_reply(COUNT)
def count_without_beginning(call: Call, reply: Any) -> None:
    """CountTokens does not count the beginning-of-sequence token."""
    reply.input_tokens -= 1


@on_call(COUNT)
def counts_raw_as_chat(call: Call) -> None:
    """CountTokens ignores raw."""
    if len(call.request.prompt) < 100:
        call.request.ClearField("raw")


@on_reply(COUNT)
def largest_reply_is_context(call: Call, reply: Any) -> None:
    """max_output_tokens ignores the card's sequence_length_limit."""
    reply.max_output_tokens = max(0, 3072 - reply.input_tokens)


@on_reply(COUNT)
def counts_characters(call: Call, reply: Any) -> None:
    """Counts characters that are not ASCII as one token."""
    if call.request is not None:
        reply.input_tokens -= len(call.request.prompt.encode()) - len(call.request.prompt)


@on_reply(COUNT)
def does_not_count_beyond_context(call: Call, reply: Any) -> None:
    """Rejects prompts that do not fit the context."""
    if reply.max_output_tokens == 0:
        reject("prompt")


@on_reply(CARD)
def card_swaps_limits(call: Call, reply: Any) -> None:
    """The card has the limits in each other's field."""
    limits = reply.model_card.limits
    first, second = limits.context_length_limit, limits.sequence_length_limit
    limits.context_length_limit, limits.sequence_length_limit = second, first


@on_reply(CARD)
def card_rounds_prices(call: Call, reply: Any) -> None:
    """The card has rounded prices."""
    for price in reply.model_card.prices:
        price.neuron_cost = "0.37"


@on_reply(CARD)
def card_without_defaults(call: Call, reply: Any) -> None:
    """The card lacks the defaults of sampling."""
    reply.model_card.generation_defaults.ClearField("temperature")


@on_reply(CARD)
def card_shows_accounts(call: Call, reply: Any) -> None:
    """The card shows the quotas of all accounts."""
    reply.model_card.properties[4].value += "\naccounts:\n  main: 100000000"


@on_reply(CARD)
def card_without_name(call: Call, reply: Any) -> None:
    """The card has no name."""
    reply.model_card.name = ""


@on_reply(CARD)
def card_hides_account_quota(call: Call, reply: Any) -> None:
    """The card never shows the account's quota."""
    reply.model_card.quota.ClearField("account_max_requests_per_min")


@on_reply(USAGE)
def usage_hides_account(call: Call, reply: Any) -> None:
    """GetUsage shows another account."""
    reply.account = "account"


@on_reply(USAGE)
def usage_shows_full_quota(call: Call, reply: Any) -> None:
    """GetUsage always shows the whole quota."""
    reply.quota.requests_left = reply.quota.max_requests_per_min


@on_reply(USAGE)
def usage_has_empty_days(call: Call, reply: Any) -> None:
    """GetUsage lists days without usage."""
    reply.days.add(date="2020-01-01")


HEALTH_SERVING, HEALTH_NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


@on_reply("Check")
def server_is_not_serving(call: Call, reply: Any) -> None:
    """The whole server is never SERVING."""
    if not call.request.service:
        reply.status = HEALTH_NOT_SERVING


@on_reply("Check")
def services_are_not_serving(call: Call, reply: Any) -> None:
    """Single services are never SERVING."""
    if call.request.service:
        reply.status = HEALTH_NOT_SERVING


@on_call("Check")
def every_service_is_known(call: Call) -> None:
    """Check returns SERVING for every name."""
    call.request.service = ""


@on_reply("Watch")
def watch_is_not_serving(call: Call, reply: Any) -> None:
    """Watch never sends SERVING."""
    if reply.status == HEALTH_SERVING:
        reply.status = HEALTH_NOT_SERVING


@on_call("Watch")
def watch_rejects_unknown(call: Call) -> None:
    """Watch ends with NOT_FOUND for an unknown service."""
    if call.request.service == "nothing":
        raise Failure("NOT_FOUND", "unknown service")


@on_call("Check GenerateStream")
def busy_is_not_serving(call: Call) -> None:
    """Check fails after a stream has started."""
    if call.method == "Check" and call.state.get("busy"):
        raise Failure("UNAVAILABLE", "busy")
    call.state["busy"] = True


@on_reply("ServerReflectionInfo")
def reflection_lists_no_services(call: Call, reply: Any) -> None:
    """Reflection lists no services of the contract."""
    services = reply.list_services_response.service
    kept = [service for service in services if not service.name.startswith("llama2")]
    if kept:
        del services[:]
        services.extend(kept)


@on_data("ServerReflectionInfo")
def reflection_without_v1alpha(call: Call) -> None:
    """Serves only v1 of reflection."""
    if "v1alpha" in call.path:
        raise Failure("UNIMPLEMENTED", "unknown service")


@on_reply("ServerReflectionInfo")
def reflection_without_imports(call: Call, reply: Any) -> None:
    """Reflection returns a file without its imports."""
    del reply.file_descriptor_response.file_descriptor_proto[1:]


@on_reply("ServerReflectionInfo")
def reflection_finds_everything(call: Call, reply: Any) -> None:
    """Reflection returns an empty response for an unknown symbol."""
    reply.ClearField("error_response")


@on_data()
def replaces_invalid_utf_8(call: Call) -> None:
    """Replaces bytes that are not UTF-8."""
    if call.request is None and call.data[:1] == b"\x0a" and len(call.data) < 10:
        text = call.data[2:].decode(errors="replace")
        call.data = pb.CountTokensRequest(prompt=text).SerializeToString()


@on_data()
def rejects_unknown_fields(call: Call) -> None:
    """Rejects unknown fields."""
    if call.data.endswith(bytes.fromhex("f8ff7f01")):
        reject("")


@on_data(COUNT)
def first_value_wins(call: Call) -> None:
    """Takes the first value of a field that occurs twice."""
    if call.data.count(b"\x0a\x05") == 2:
        call.request, call.data = None, call.data[:7] + call.data[14:]


@on_data("Generate CountTokens")
def ignores_malformed(call: Call) -> None:
    """Takes a malformed message for an empty one."""
    try:
        pb.CountTokensRequest.FromString(call.data)
    except DecodeError:
        if call.data.startswith(b"\xff") or call.data.endswith(b"\xab"):
            call.data = pb.GenerateRequest(prompt="hi").SerializeToString()


@on_data(COUNT)
def cuts_large_messages(call: Call) -> None:
    """Cuts the prompt of a message that is too large."""
    if len(call.data) > 1_000_000:
        call.data, call.request = pb.CountTokensRequest(prompt="a" * 4000).SerializeToString(), None


@on_error("Generate")
def unauthenticated_is_permission_denied(call: Call, failure: Failure) -> None:
    """A missing key is PERMISSION_DENIED for Generate."""
    if failure.code == "UNAUTHENTICATED" and call.role == "none":
        failure.code = "PERMISSION_DENIED"
