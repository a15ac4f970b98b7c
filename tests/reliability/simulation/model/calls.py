"""Rules about calls and their records."""

from decimal import Decimal

from tests.reliability.simulation.model.facts import ENGINE_FAULTS, MET, UNAVAILABLE_CAUSES, Facts, Verdicts

CAUSE_SECONDS = 8.0
"""How long an error is repeated after its cause: pauses, probes, and retries of what waits in memory."""
ENGINE_SECONDS = 45.0
"""The longest step timeout, and the time of three probes."""
RESULT_SECONDS = 4.0
"""How long a call may share a generation that has failed and misses its result."""
PATIENT_SECONDS = 900.0
"""A deadline that no call reaches: longer than the queue timeout and any fault."""
REJECTED_BEFORE_RECORD = {
    "INVALID_REQUEST",
    "UNAUTHENTICATED",
    "ACCOUNT_DISABLED",
    "QUOTA_EXCEEDED",
    "TOO_MANY_REQUESTS",
}
OK_OUTCOMES = {"END_OF_SEQUENCE", "MAX_TOKENS", "STOP_SEQUENCE"}


def every_call_ends(facts: Facts) -> Verdicts:
    """Each call ends exactly once, and a patient one before its deadline."""
    for number in facts.calls.keys() - facts.ends.keys():
        yield f"call {number} has no end"
    for number in facts.twice_ended:
        yield f"call {number} has ended twice"
    for number, end in facts.ends.items():
        yield MET
        if end["code"] == "DEADLINE_EXCEEDED" and facts.calls[number].get("timeout", 0) >= PATIENT_SECONDS:
            yield f"call {number} was not answered until its deadline"


def unavailability_has_a_cause(facts: Facts) -> Verdicts:
    """UNAVAILABLE occurs only while its cause lasts: a start or an end, or a store, a disk or an engine that fails."""
    for number, end in facts.ends.items():
        if end["code"] != "UNAVAILABLE":
            continue
        yield MET
        call, causes = facts.calls[number], UNAVAILABLE_CAUSES.get(end.get("reason") or "")
        if causes is None:
            if not facts.absent(call["process"], call["at"] - CAUSE_SECONDS, end["at"] + 1):
                yield f"call {number} found no server at {call['at']:.1f}"
        elif not facts.lasts(causes, call["at"] - _cause_seconds(causes), end["at"] + 1):
            yield f"call {number} ended with {end['reason']} without a cause at {end['at']:.1f}"


def _cause_seconds(causes: frozenset[str]) -> float:
    return ENGINE_SECONDS if causes is ENGINE_FAULTS else CAUSE_SECONDS


def statuses_are_true(facts: Facts) -> Verdicts:
    """UNKNOWN never occurs; INTERNAL occurs only after a fault in the call's process; each status has a reason."""
    for number, end in facts.ends.items():
        call, code, reason = facts.calls[number], end["code"], end.get("reason")
        yield from [MET] * (code != "OK")
        if code in ("UNKNOWN", "DATA_LOSS", "ABORTED"):
            yield f"call {number} ended with {code}: {end.get('message')}"
        if code == "INTERNAL" and not facts.raised(call["process"], call["at"] - RESULT_SECONDS, end["at"]):
            yield f"call {number} ended with INTERNAL without a fault"
        if code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE") and reason is not None and end.get("retry_after") is None:
            yield f"call {number} ended with {reason} without a retry time"


def keys_are_accepted(facts: Facts) -> Verdicts:
    """Each valid key is accepted, also while the keys file cannot be read; other calls never are."""
    for number, end in facts.ends.items():
        rejected = end["code"] in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        if facts.calls[number]["account"] in ("keyless", "disabled"):
            yield MET
            if end["code"] == "OK":
                yield f"call {number} was served without a valid key"
        elif rejected:
            yield f"call {number} ended with {end['code']} although its key is valid"


def replies_are_exact(facts: Facts) -> Verdicts:
    """A complete reply has the tokens that its prompt determines, and its price."""
    for number, end in facts.ends.items():
        if end["code"] != "OK" or "usage" not in end:
            continue
        yield MET
        price = facts.price(end)
        if end["usage"] != facts.calls[number]["expected"]:
            yield f"call {number} has {end['usage']} tokens instead of {facts.calls[number]['expected']}"
        if Decimal(end["neurons"]) != price:
            yield f"call {number} costs {end['neurons']} neurons instead of {price}"


def one_record_per_request(facts: Facts) -> Verdicts:
    """Each admitted request has exactly one record, a request that was rejected before has none."""
    for request_id, records in facts.records.items():
        if len(records) > 1:
            yield f"request {request_id} has {len(records)} records"
        if request_id not in facts.arrivals:
            yield f"the record of {request_id} belongs to no call"
    for event in facts.history.of("admit"):
        yield MET
        if event["id"] not in facts.records:
            yield f"the record of {event['id']} is lost"
    for end in facts.ends.values():
        if end.get("reason") in REJECTED_BEFORE_RECORD and end["id"] in facts.records:
            yield f"the rejected request {end['id']} has a record"


def records_are_exact(facts: Facts) -> Verdicts:
    """A record has the tokens that its client was told; no record has more tokens than its reply."""
    for request_id, records in facts.records.items():
        if request_id not in facts.arrivals:
            continue
        yield MET
        number, record = facts.arrivals[request_id]["call"], records[0]
        end, expected = facts.ends.get(number, {}), facts.calls[number].get("expected", [0, 0])
        inputs, outputs = record["usage"]
        if Decimal(record["neurons"]) != (price := facts.price(record)):
            yield f"the record of {request_id} costs {record['neurons']} neurons instead of {price}"
        if inputs not in (0, expected[0]) or outputs > expected[1]:
            yield f"the record of {request_id} has {record['usage']} of {expected} tokens"
        if record["account"] != facts.calls[number]["account"]:
            yield f"the record of {request_id} is of the wrong account"
        told = (end.get("usage"), end.get("cached"), end.get("finish_reason"))
        recorded = (record["usage"], record["cached"], record["outcome"])
        if end.get("code") == "OK" and recorded != told:
            if record["outcome"] == "INTERRUPTED" and facts.is_lost_in_memory(
                facts.calls[number]["process"], end["at"]
            ):
                continue
            yield f"the record of {request_id} is {record['usage']} {record['outcome']}, its client was told {told}"
        if end.get("code") == "RESOURCE_EXHAUSTED" and record["usage"] != [0, 0]:
            yield f"the rejected request {request_id} has {record['usage']} tokens"


def totals_are_exact(facts: Facts) -> Verdicts:
    """Each database's daily totals are the sums of its records; no request still runs after the drain."""
    for event in facts.history.of("database"):
        yield MET
        if event["wrong_totals"] or event["running"]:
            yield f"database {event['database']}: {event['wrong_totals']} wrong totals, {event['running']} running"
