"""Mutants of counting, of the limit of calls that generate nothing, and of limits of single accounts."""

from decimal import Decimal
from typing import Any

from google.rpc import error_details_pb2

from conformance.mutants.behavior import GENERATION, Call, Failure, on_call, on_error, on_reply, reject
from llama2.v1 import text_generation_pb2 as pb

CARD, COUNT, USAGE = "GetModelCard", "CountTokens", "GetUsage"
PRICE, DEFAULT_MAX_TOKENS, BUDGET = Decimal("0.3672"), 256, 1000
FLOOD = 20
"""Number of calls after which a mutant takes them for a flood."""


@on_call(COUNT)
def count_ignores_max_tokens(call: Call) -> None:
    """CountTokens ignores max_tokens."""
    call.request.ClearField("max_tokens")


@on_call(COUNT)
def count_clamps_max_tokens(call: Call) -> None:
    """CountTokens takes the nearest valid max_tokens for one out of range."""
    if call.request.HasField("max_tokens"):
        largest = 70 if len(call.request.prompt) > 3000 else 2500
        call.request.max_tokens = max(1, min(largest, call.request.max_tokens))


@on_reply(COUNT)
def count_price_of_whole_default(call: Call, reply: Any) -> None:
    """Does not reduce the default of max_tokens to what the context leaves."""
    if reply.HasField("max_neurons") and not call.request.HasField("max_tokens"):
        reply.max_neurons = str(PRICE * (reply.input_tokens + DEFAULT_MAX_TOKENS))


@on_reply(COUNT)
def count_rounds_price(call: Call, reply: Any) -> None:
    """CountTokens rounds the price."""
    if reply.HasField("max_neurons"):
        reply.max_neurons = str(round(Decimal(reply.max_neurons), 2))


@on_reply(COUNT)
def count_price_beyond_context(call: Call, reply: Any) -> None:
    """Returns the price of a prompt that does not fit the context."""
    if not reply.HasField("max_neurons"):
        reply.max_neurons = str(PRICE * reply.input_tokens)


@on_reply(COUNT)
def count_shows_whole_quota(call: Call, reply: Any) -> None:
    """CountTokens always shows the whole quota."""
    if call.role == "quota":
        reply.requests_left = 3


@on_reply(COUNT)
def count_shows_no_wait(call: Call, reply: Any) -> None:
    """CountTokens never shows a time in the queue."""
    reply.estimated_queue_time.FromSeconds(0)


@on_reply(COUNT)
def count_always_shows_wait(call: Call, reply: Any) -> None:
    """CountTokens always shows a time in the queue."""
    reply.estimated_queue_time.FromSeconds(1)


@on_call(COUNT)
def counts_are_unlimited(call: Call) -> None:
    """Accepts any number of CountTokens."""
    if call.role == "quota":
        call.use_key("budget")  # of another account in each call


@on_call(GENERATION)
def invalid_requests_are_unlimited(call: Call) -> None:
    """Accepts any number of invalid requests."""
    if call.role == "quota" and call.request.top_p > 1:
        call.use_key("budget")


@on_call(f"{CARD} Generate")
def limit_spares_generations(call: Call) -> None:
    """Serves Generate while the account makes too many calls that generate nothing."""
    if call.method == CARD:
        call.state["calls"] = call.state.get("calls", 0) + 1
    elif call.state.get("calls", 0) > FLOOD and call.role == "quota":
        call.use_key("budget")


@on_call(f"{CARD} Generate")
def limit_of_all_accounts(call: Call) -> None:
    """Rejects the calls of all accounts while one of them makes too many."""
    if call.method == CARD:
        call.state["calls"] = call.state.get("calls", 0) + 1
    elif call.state.get("calls", 0) > FLOOD:
        reject("", "too many", "RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS")


@on_error()
def too_many_is_quota_exceeded(call: Call, failure: Failure) -> None:
    """Too many calls that generate nothing have the reason of a used up quota."""
    if failure.reason == "TOO_MANY_REQUESTS":
        failure.change_detail(error_details_pb2.ErrorInfo, lambda info: setattr(info, "reason", "QUOTA_EXCEEDED"))


@on_error()
def too_many_without_delay(call: Call, failure: Failure) -> None:
    """Too many calls that generate nothing have no RetryInfo."""
    if failure.reason == "TOO_MANY_REQUESTS":
        failure.drop_details("RetryInfo")


@on_call(GENERATION)
def no_budget(call: Call) -> None:
    """Applies no budget."""
    if call.role == "budget":
        call.use_key("main")


@on_reply(f"{CARD} {USAGE}")
def shows_card_quota_to_all(call: Call, reply: Any) -> None:
    """Shows the card's quota instead of the account's."""
    if call.role == "budget" and call.method == CARD:
        reply.model_card.quota.account_max_requests_per_min = 3
    elif call.role == "budget":
        reply.quota.max_requests_per_min = 3


@on_call(GENERATION)
def applies_card_quota_to_all(call: Call) -> None:
    """Applies the card's quota to every account."""
    call.state["calls"] = call.state.get("calls", 0) + (call.role == "budget")
    if call.role == "budget" and call.state["calls"] > 3:
        reject("", "the quota is used up", "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")


@on_reply(CARD)
def card_hides_budget(call: Call, reply: Any) -> None:
    """The card does not show the account's budget."""
    reply.model_card.quota.ClearField("account_neurons_per_month")


@on_reply(USAGE)
def usage_shows_budget_to_all(call: Call, reply: Any) -> None:
    """GetUsage shows a budget to accounts without one."""
    if not reply.HasField("budget"):
        reply.budget.neurons_per_month = str(BUDGET)


@on_call(GENERATION)
def keeps_reservations(call: Call) -> None:
    """Never makes the difference between the highest price and the price available again."""
    highest = PRICE * (call.request.max_tokens or DEFAULT_MAX_TOKENS)
    call.state["reserved"] = call.state.get("reserved", 0) + (highest if call.role == "budget" else 0)
    if call.role == "budget" and call.state["reserved"] > BUDGET:
        reject("", "the budget is exhausted", "RESOURCE_EXHAUSTED", "BUDGET_EXHAUSTED")


@on_reply(USAGE)
def reservation_is_spent(call: Call, reply: Any) -> None:
    """GetUsage shows what is reserved as spent."""
    if reply.HasField("budget"):
        reply.budget.neurons_spent = str(Decimal(reply.budget.neurons_spent) + Decimal(reply.budget.neurons_reserved))
        reply.budget.neurons_reserved = "0"


@on_call(GENERATION)
def ignores_reservations(call: Call) -> None:
    """Compares a request only with what ended requests have spent."""
    if call.role == "budget" and call.state.setdefault("first", call) is not call and call.method == "GenerateStream":
        call.use_key("main")


@on_error()
def budget_is_quota_exceeded(call: Call, failure: Failure) -> None:
    """An exhausted budget has the reason of a used up quota."""
    if failure.reason == "BUDGET_EXHAUSTED":
        failure.change_detail(error_details_pb2.ErrorInfo, lambda info: setattr(info, "reason", "QUOTA_EXCEEDED"))


@on_error()
def budget_without_quota_failure(call: Call, failure: Failure) -> None:
    """An exhausted budget has no QuotaFailure."""
    if failure.reason == "BUDGET_EXHAUSTED":
        failure.drop_details("QuotaFailure")


@on_error()
def budget_delay_is_a_minute(call: Call, failure: Failure) -> None:
    """RetryInfo of an exhausted budget is a minute."""
    if failure.reason == "BUDGET_EXHAUSTED":
        failure.change_detail(error_details_pb2.RetryInfo, lambda info: info.retry_delay.FromSeconds(60))


@on_call(GENERATION)
async def reserves_default_max_tokens(call: Call) -> None:
    """Reserves at least the price of the card's default of max_tokens."""
    if call.role == "budget" and 0 < call.request.max_tokens < DEFAULT_MAX_TOKENS:
        await call.send_another(pb.GenerateRequest(prompt="count", raw=True, max_tokens=DEFAULT_MAX_TOKENS))


@on_call(GENERATION)
async def rejected_budget_costs_quota(call: Call) -> None:
    """A request that does not fit into the budget costs quota and neurons."""
    if call.role == "budget" and call.state.setdefault("first", call) is not call:
        await call.send_another(pb.GenerateRequest(prompt="a", raw=True, max_tokens=1, no_cache=True))


@on_call(GENERATION)
def one_budget_for_all(call: Call) -> None:
    """Subtracts the prices of all accounts from one budget."""
    if call.role == "budget":
        call.share_key()


@on_call(GENERATION)
def cached_reply_needs_budget(call: Call) -> None:
    """Does not use the cache for accounts with a budget."""
    if call.role == "budget":
        call.request.no_cache = True
