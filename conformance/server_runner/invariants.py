"""Rules for every message of a reply or for an error."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from conformance.server_runner import receipts
from conformance.server_runner.outcome import Outcome
from conformance.v1 import conformance_pb2 as pb

PRICE = Decimal("0.3672")
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
MAX_TRAILER_BYTES = 4096


def broken(rule: int, outcome: Outcome, earlier: Sequence[Outcome]) -> Iterator[str]:
    """Yield each violation of a rule in words; `earlier` has the results of all steps."""
    if rule == pb.INVARIANT_RECEIPT_SIGNATURE:
        yield from receipts.wrong_signature(outcome, earlier)
    else:
        yield from _RULES[rule](outcome)


def _completion_last(outcome: Outcome) -> Iterator[str]:
    have = [completion is not None for completion in outcome.completions]
    if have != [False] * (len(have) - 1) + [True]:
        yield f"messages {[index for index, has_one in enumerate(have, 1) if has_one]} of {len(have)} have a completion"


def _whole_characters(outcome: Outcome) -> Iterator[str]:
    for index, delta in enumerate(outcome.deltas, 1):
        if "\ufffd" in delta:
            yield f"message {index} has a part of a character"


def _request_id(outcome: Outcome) -> Iterator[str]:
    if not REQUEST_ID.fullmatch(outcome.completion.request_id):
        yield f"got {outcome.completion.request_id!r}"


def _exact_price(outcome: Outcome) -> Iterator[str]:
    usage = outcome.completion.usage
    wanted = Decimal(0) if outcome.completion.cached else PRICE * (usage.input_tokens + usage.output_tokens)
    if not re.fullmatch(r"\d+(\.\d+)?", usage.neurons) or Decimal(usage.neurons) != wanted:
        yield f"want {wanted}, got {usage.neurons!r}"


def _timings(outcome: Outcome) -> Iterator[str]:
    timings = outcome.completion.timings
    times = [timings.queue_time, timings.time_to_first_token, timings.total_time]
    nanoseconds = [time.ToNanoseconds() for time in times]
    if nanoseconds != sorted(nanoseconds) or nanoseconds[-1] <= 0:
        yield f"got {nanoseconds} ns"


def _no_empty_delta(outcome: Outcome) -> Iterator[str]:
    if "" in outcome.deltas[:-1]:
        yield f"message {outcome.deltas.index('') + 1} has no text"


def _small_trailers(outcome: Outcome) -> Iterator[str]:
    size = sum(len(key) + len(value) for key, value in outcome.trailers)
    if size >= MAX_TRAILER_BYTES:
        yield f"{size} bytes"


def _pushback(outcome: Outcome) -> Iterator[str]:
    delay = outcome.detail("RetryInfo").retry_delay.ToMilliseconds()
    wanted = str(delay if delay <= outcome.deadline_ms else -1)
    got = [str(value) for key, value in outcome.trailers if key == "grpc-retry-pushback-ms"]
    if got != [wanted]:
        yield f"want {wanted}, got {got or 'none'}"


def _domain(outcome: Outcome) -> Iterator[str]:
    if outcome.detail("ErrorInfo").domain != "llama2.v1":
        yield f"got {outcome.detail('ErrorInfo').domain!r}"


def _request_info(outcome: Outcome) -> Iterator[str]:
    if not REQUEST_ID.fullmatch(outcome.detail("RequestInfo").request_id):
        yield f"got {outcome.detail('RequestInfo').request_id!r}"


def _equal_message(outcome: Outcome) -> Iterator[str]:
    if outcome.status.message != outcome.message or not outcome.message:
        yield f"the details have {outcome.status.message!r}, the call {outcome.message!r}"


def _next_month(outcome: Outcome) -> Iterator[str]:
    now = datetime.now(UTC)
    wanted = (now.replace(day=1, hour=0, minute=0, second=0, microsecond=0) + timedelta(days=32)).replace(day=1)
    got = now + outcome.detail("RetryInfo").retry_delay.ToTimedelta()
    if abs(got - wanted) > receipts.CLOCKS:
        yield f"want {wanted:%Y-%m-%d %H:%M}, got {got:%Y-%m-%d %H:%M}"


def _fingerprint_inputs(outcome: Outcome) -> Iterator[str]:
    inputs = outcome.last.get("execution", {}).get("fingerprint_inputs", [])
    names = [one.get("name", "") for one in inputs]
    if not names or names != sorted(set(names)) or not all(one.get("name") and one.get("value") for one in inputs):
        yield f"got {names}"


_RULES: Mapping[int, Callable[[Outcome], Iterator[str]]] = {
    pb.INVARIANT_COMPLETION_LAST: _completion_last,
    pb.INVARIANT_WHOLE_CHARACTERS: _whole_characters,
    pb.INVARIANT_REQUEST_ID: _request_id,
    pb.INVARIANT_EXACT_PRICE: _exact_price,
    pb.INVARIANT_TIMINGS: _timings,
    pb.INVARIANT_NO_EMPTY_DELTA: _no_empty_delta,
    pb.INVARIANT_SMALL_TRAILERS: _small_trailers,
    pb.INVARIANT_PUSHBACK: _pushback,
    pb.INVARIANT_DOMAIN: _domain,
    pb.INVARIANT_REQUEST_INFO: _request_info,
    pb.INVARIANT_EQUAL_MESSAGE: _equal_message,
    pb.INVARIANT_NEXT_MONTH: _next_month,
    pb.INVARIANT_FINGERPRINT_INPUTS: _fingerprint_inputs,
    pb.INVARIANT_RECEIPT_DIGESTS: receipts.wrong_digests,
    pb.INVARIANT_RECEIPT_STATEMENT: receipts.wrong_statement,
    pb.INVARIANT_RECEIPT_FORM: receipts.wrong_form,
}
