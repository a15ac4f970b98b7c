"""The model of the service: what its users rely on, checked against a history.

Each rule reads the whole history and yields one line per violation. A rule knows nothing of the server's code: only
calls and their ends, the slots that were granted, the quota that was consumed, health, and the records in the end.
"""

from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal

from tests.reliability.simulation.facts import ENGINE_FAULTS, HEALTH_CAUSES, UNAVAILABLE_CAUSES, Facts, promises
from tests.reliability.simulation.history import Event, History

WINDOW_SECONDS = 60.0
CAUSE_SECONDS = 8.0
"""How long an error is repeated after its cause: pauses, probes, and retries of what waits in memory."""
HEALTH_SECONDS = 15.0
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


def every_call_ends(facts: Facts) -> Iterator[str]:
    """Each call ends exactly once, and a patient one before its deadline."""
    for number in facts.calls.keys() - facts.ends.keys():
        yield f"call {number} has no end"
    for number in facts.twice_ended:
        yield f"call {number} has ended twice"
    for number, end in facts.ends.items():
        if end["code"] == "DEADLINE_EXCEEDED" and facts.calls[number].get("timeout", 0) >= PATIENT_SECONDS:
            yield f"call {number} was not answered until its deadline"


def unavailability_has_a_cause(facts: Facts) -> Iterator[str]:
    """UNAVAILABLE occurs only while its cause lasts: a start or an end, or a store, a disk or an engine that fails."""
    for number, end in facts.ends.items():
        if end["code"] != "UNAVAILABLE":
            continue
        call, causes = facts.calls[number], UNAVAILABLE_CAUSES.get(end.get("reason") or "")
        if causes is None:
            if not facts.absent(call["process"], call["at"] - CAUSE_SECONDS, end["at"] + 1):
                yield f"call {number} found no server at {call['at']:.1f}"
        elif not facts.lasts(causes, call["at"] - _cause_seconds(causes), end["at"] + 1):
            yield f"call {number} ended with {end['reason']} without a cause at {end['at']:.1f}"


def _cause_seconds(causes: frozenset[str]) -> float:
    return ENGINE_SECONDS if causes is ENGINE_FAULTS else CAUSE_SECONDS


def statuses_are_true(facts: Facts) -> Iterator[str]:
    """UNKNOWN never occurs; INTERNAL occurs only after a fault in the call's process; each status has a reason."""
    for number, end in facts.ends.items():
        call, code, reason = facts.calls[number], end["code"], end.get("reason")
        if code in ("UNKNOWN", "DATA_LOSS", "ABORTED"):
            yield f"call {number} ended with {code}: {end.get('message')}"
        if code == "INTERNAL" and not facts.raised(call["process"], call["at"] - RESULT_SECONDS, end["at"]):
            yield f"call {number} ended with INTERNAL without a fault"
        if code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE") and reason is not None and end.get("retry_after") is None:
            yield f"call {number} ended with {reason} without a retry time"


def replies_are_exact(facts: Facts) -> Iterator[str]:
    """A complete reply has the tokens that its prompt determines, and its price."""
    for number, end in facts.ends.items():
        if end["code"] != "OK" or "usage" not in end:
            continue
        price = facts.price(end)
        if end["usage"] != facts.calls[number]["expected"]:
            yield f"call {number} has {end['usage']} tokens instead of {facts.calls[number]['expected']}"
        if Decimal(end["neurons"]) != price:
            yield f"call {number} costs {end['neurons']} neurons instead of {price}"


def one_record_per_request(facts: Facts) -> Iterator[str]:
    """Each admitted request has exactly one record, a request that was rejected before has none."""
    for request_id, records in facts.records.items():
        if len(records) > 1:
            yield f"request {request_id} has {len(records)} records"
        if request_id not in facts.arrivals:
            yield f"the record of {request_id} belongs to no call"
    for event in facts.history.of("admit"):
        if event["id"] not in facts.records:
            yield f"the record of {event['id']} is lost"
    for end in facts.ends.values():
        if end.get("reason") in REJECTED_BEFORE_RECORD and end["id"] in facts.records:
            yield f"the rejected request {end['id']} has a record"


def records_are_exact(facts: Facts) -> Iterator[str]:
    """A record has the tokens that its client was told; no record has more tokens than its reply."""
    for request_id, records in facts.records.items():
        if request_id not in facts.arrivals:
            continue
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
        if end.get("code") == "OK" and (record["usage"], record["cached"], record["outcome"]) != told:
            yield f"the record of {request_id} is {record['usage']} {record['outcome']}, its client was told {told}"
        if end.get("code") == "RESOURCE_EXHAUSTED" and record["usage"] != [0, 0]:
            yield f"the rejected request {request_id} has {record['usage']} tokens"


def totals_are_exact(facts: Facts) -> Iterator[str]:
    """Each database's daily totals are the sums of its records; no request still runs after the drain."""
    for event in facts.history.of("database"):
        if event["wrong_totals"] or event["running"]:
            yield f"database {event['database']}: {event['wrong_totals']} wrong totals, {event['running']} running"


def slots_are_limited_and_free_again(facts: Facts) -> Iterator[str]:
    """No process holds more slots than the card allows; in the end, all slots are free and nothing waits."""
    slots = facts.shape["slots"]
    held: dict[str, set[int]] = defaultdict(set)
    for event in facts.history.of("grant", "release"):
        (held[event["process"]].add if event["event"] == "grant" else held[event["process"]].discard)(event["number"])
        if len(held[event["process"]]) > slots:
            yield f"{event['process']} holds {len(held[event['process']])} slots at {event['at']:.1f}"
    for state in facts.history.of("state"):
        left = {name: state[name] for name in ("running", "waiting", "pending", "admitted", "violations")}
        if any(left.values()) or state["kv_slots"] != slots:
            yield f"{state['process']} is at rest with {left}, {state['kv_slots']} of {slots} KV slots"
        if not state["serving"] or not all(state["stores"].values()):
            yield f"{state['process']} is at rest and not serving: {state['serving']}, {state['stores']}"


def slots_are_used(facts: Facts) -> Iterator[str]:
    """No request waits while a slot is free for more than 3 s; a faulty handover is repeated after 1 s."""
    slots = facts.shape["slots"]
    waiting: dict[str, set[int]] = defaultdict(set)
    held: dict[str, set[int]] = defaultdict(set)
    idle_since: dict[str, float] = {}
    for event in facts.history.of("wait", "grant", "leave", "release"):
        process, number = event["process"], event["number"]
        if process in idle_since and event["at"] - idle_since[process] > 3:
            since = idle_since.pop(process)
            yield f"{process} has a free slot and waiting requests from {since:.1f} to {event['at']:.1f}"
        if event["event"] == "wait":
            waiting[process].add(number)
        else:
            waiting[process].discard(number)
        (held[process].add if event["event"] == "grant" else held[process].discard)(number)
        if waiting[process] and len(held[process]) < slots:
            idle_since.setdefault(process, event["at"])
        else:
            idle_since.pop(process, None)


def quota_is_never_exceeded(facts: Facts) -> Iterator[str]:
    """In each window of 60 s, an account consumes at most its quota, without what it got back."""
    consumed: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in facts.history.of("consume", "refund"):
        local_at, shared_at = event["unit"]
        counter = event["process"] if shared_at is None else "shared"
        times = consumed[counter, event["account"]]
        at = (local_at if shared_at is None else shared_at) / 1e6
        if event["event"] == "refund":
            if at in times:
                times.remove(at)
            continue
        times.append(at)
        used = sum(time > at - WINDOW_SECONDS for time in times)
        if used > facts.shape["limits"][event["account"]]:
            yield f"account {event['account']} consumed {used} requests in the 60 s before {at:.1f} ({counter})"


def retry_times_are_kept(facts: Facts) -> Iterator[str]:
    """Under 1% of the calls that return in time are rejected for the same reason."""
    returned, broken = promises(facts)
    if broken > max(3, 0.01 * returned):
        yield f"{broken} of {returned} calls that returned in time were rejected for the same reason"


def health_is_true(facts: Facts) -> Iterator[str]:
    """A process that is not disturbed serves; a call that it cannot serve has a cause that health shows, too."""
    last: dict[str, Event] = {}
    for event in facts.history.of("health"):
        before = last.get(event["process"])
        last[event["process"]] = event
        if before is None or event["at"] - before["at"] < HEALTH_SECONDS:
            continue
        for name, causes in HEALTH_CAUSES.items():
            quiet = not facts.lasts(causes, before["at"], event["at"])
            if not before[name] and quiet and not facts.absent(event["process"], before["at"], event["at"]):
                yield f"{name} of {event['process']} was false from {before['at']:.1f} to {event['at']:.1f}"


def processes_end_for_a_reason(facts: Facts) -> Iterator[str]:
    """No process ends with an exception, and the engine ends one (exit code 70) only after a fault."""
    for event in facts.history.of("crash"):
        yield f"{event['process']} ended with {event['reason']}"
    for event in facts.history.of("end of process"):
        since = event["at"] - ENGINE_SECONDS
        explained = facts.raised(event["process"], since, event["at"])
        if event["code"] == 70 and not explained and not facts.lasts(ENGINE_FAULTS, since, event["at"]):
            yield f"the engine of {event['process']} ended it without a fault at {event['at']:.1f}"


def health_shows_faults(facts: Facts) -> Iterator[str]:
    """A process whose disk is full for 4 s is NOT_SERVING."""
    health = [event for event in facts.history.of("health") if not event["serving"]]
    for name, process, start, end in facts.faults_by_process:
        shown = any(event["process"] == process and start <= event["at"] <= end for event in health)
        if name == "a full disk" and end - start > 4 and not shown and not facts.absent(process, start, end):
            yield f"{process} was SERVING with a full disk from {start:.1f} to {end:.1f}"


def metrics_are_exact(facts: Facts) -> Iterator[str]:
    """The counters of a process that lives in the end agree with its calls and their records."""
    failed = {event["process"] for event in facts.history.of("raised") if event["fault"].startswith("telemetry")}
    for state in facts.history.of("state"):
        if state["process"] in failed:
            continue
        ids = [one for one, event in facts.arrivals.items() if event["process"] == state["process"]]
        records = [facts.records[one][0] for one in ids if one in facts.records]
        computed = [record for record in records if not record["cached"]]
        expected = {
            "input": sum(record["usage"][0] for record in computed),
            "output": sum(record["usage"][1] for record in computed),
            "llama2_neurons_total": float(sum(Decimal(record["neurons"]) for record in records)),
            "llama2_requests_total": len(ids),
        }
        if state["metrics"] != expected:
            yield f"the metrics of {state['process']} are {state['metrics']} instead of {expected}"


def accounts_share_the_slots(facts: Facts) -> Iterator[str]:
    """In 100 generations of a process, accounts that always wait get equal shares: Jain's index is at least 0.95."""
    waiting: dict[str, dict[int, str]] = defaultdict(dict)
    window: dict[str, list[tuple[str, frozenset[str]]]] = defaultdict(list)
    for event in facts.history.of("wait", "grant", "leave"):
        process, account = event["process"], event["account"]
        if event["event"] == "wait":
            waiting[process][event["number"]] = account
        else:
            waiting[process].pop(event["number"], None)
        if event["event"] != "grant":
            continue
        grants = window[process]
        grants.append((account, frozenset(waiting[process].values())))
        if len(grants) == 100:
            always = frozenset.intersection(*(names for _, names in grants))
            counts = [sum(name == one for one, _ in grants) for name in always]
            if counts and sum(counts) ** 2 < 0.95 * len(counts) * sum(count**2 for count in counts):
                yield f"{process} gave {dict(zip(always, counts, strict=True))} of 100 slots until {event['at']:.1f}"
            grants.clear()


RULES = (
    every_call_ends,
    unavailability_has_a_cause,
    statuses_are_true,
    replies_are_exact,
    one_record_per_request,
    records_are_exact,
    totals_are_exact,
    slots_are_limited_and_free_again,
    slots_are_used,
    quota_is_never_exceeded,
    retry_times_are_kept,
    health_is_true,
    health_shows_faults,
    processes_end_for_a_reason,
    metrics_are_exact,
    accounts_share_the_slots,
)


def violations(history: History) -> list[str]:
    """Return the violations of all rules."""
    facts = Facts(history)
    return [f"{rule.__name__}: {line}" for rule in RULES for line in rule(facts)]
