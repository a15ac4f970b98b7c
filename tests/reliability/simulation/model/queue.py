"""Rules about slots, quota, retry times and shares."""

from collections import defaultdict

from tests.reliability.simulation.history import Event
from tests.reliability.simulation.model.calls import CAUSE_SECONDS
from tests.reliability.simulation.model.facts import MET, Facts, Verdicts

WINDOW_SECONDS = 60.0
WINDOW_GRANTS = 100
MIN_QUEUE = 16
"""A shorter queue has too little space for calls that return."""
MAX_EXCEPTIONS = 5
"""The promises that one long generation breaks in one history."""


def slots_are_limited_and_free_again(facts: Facts) -> Verdicts:
    """No process holds more slots than the card allows; in the end, all slots are free and nothing waits."""
    slots = facts.shape["slots"]
    held: dict[str, set[int]] = defaultdict(set)
    for event in facts.history.of("grant", "release"):
        yield MET
        (held[event["process"]].add if event["event"] == "grant" else held[event["process"]].discard)(event["number"])
        if len(held[event["process"]]) > slots:
            yield f"{event['process']} holds {len(held[event['process']])} slots at {event['at']:.1f}"
    for state in facts.history.of("state"):
        left = {name: state[name] for name in ("running", "waiting", "pending", "admitted", "violations")}
        if any(left.values()) or state["kv_slots"] != slots:
            yield f"{state['process']} is at rest with {left}, {state['kv_slots']} of {slots} KV slots"
        if not state["serving"] or not all(state["stores"].values()):
            yield f"{state['process']} is at rest and not serving: {state['serving']}, {state['stores']}"


def slots_are_used(facts: Facts) -> Verdicts:
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
            yield MET
            waiting[process].add(number)
        else:
            waiting[process].discard(number)
        (held[process].add if event["event"] == "grant" else held[process].discard)(number)
        if waiting[process] and len(held[process]) < slots:
            idle_since.setdefault(process, event["at"])
        else:
            idle_since.pop(process, None)


def quota_is_never_exceeded(facts: Facts) -> Verdicts:
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
        yield MET
        times.append(at)
        used = sum(time > at - WINDOW_SECONDS for time in times)
        if used > facts.shape["limits"][event["account"]]:
            yield f"account {event['account']} consumed {used} requests in the 60 s before {at:.1f} ({counter})"


def retry_times_are_kept(facts: Facts) -> Verdicts:
    """A call that returns in time is not rejected for the same reason, with few exceptions.

    A displacement or a generation of over twice the mean breaks some promises of the queue at once. Together, all
    exceptions are under 1% in many seeds. Nothing is promised after a fault, with a short queue, and by one replica for
    the quota that others use, too.
    """
    returned, broken = promises(facts)
    yield from [MET] * returned
    broken = [number for number in broken if not _is_exception(facts, number)]
    if len(broken) > max(MAX_EXCEPTIONS, 0.01 * returned):
        numbers = ", ".join(str(number) for number in broken[:5])
        yield f"{len(broken)} of {returned} calls that returned in time were rejected again: {numbers}"


def promises(facts: Facts) -> tuple[int, list[int]]:
    """Return the number of calls that returned in time, and the ones of them that were rejected for the same reason."""
    returned = [call for call in facts.calls.values() if _returns_in_time(facts, call)]
    same = [call["call"] for call in returned if _reason(facts, call["call"]) == _reason(facts, call["retry_of"])]
    return len(returned), same


def _is_exception(facts: Facts, number: int) -> bool:
    """Return whether the queue displaced the call, or ran a long generation while the client waited to return."""
    call, end = facts.calls[number], facts.ends[number]
    since = facts.ends[call["retry_of"]]["at"]
    long = any(start <= call["at"] and since <= stop for start, stop in facts.long_holds[call["process"]])
    return end["reason"] != "QUOTA_EXCEEDED" and (long or bool(end.get("displaced")))


def _reason(facts: Facts, number: int) -> str | None:
    return facts.ends[number].get("reason")


def _returns_in_time(facts: Facts, call: Event) -> bool:
    first, end = facts.ends.get(call.get("retry_of") or 0), facts.ends[call["call"]]
    if first is None or first["code"] != "RESOURCE_EXHAUSTED" or call["kind"] != "obeys":
        return False
    told = facts.calls[first["call"]]
    if told["process"] != call["process"] or not 0 <= call["at"] - first["at"] - first["retry_after"] <= 1:
        return False
    if facts.shape["shared"]["quota"] if first["reason"] == "QUOTA_EXCEEDED" else facts.shape["queue"] < MIN_QUEUE:
        return False
    disturbed = [*facts.disturbed[call["process"]], *facts.disturbed[""]]
    return not any(told["at"] - CAUSE_SECONDS <= at <= end["at"] for at in disturbed)


def accounts_share_the_slots(facts: Facts) -> Verdicts:
    """In 100 generations of a process, accounts that always wait get equal shares: Jain's index is at least 0.95."""
    waiting: dict[str, dict[int, str]] = defaultdict(dict)
    window: dict[str, list[tuple[str, frozenset[str]]]] = defaultdict(list)
    for event in facts.history.of("wait", "grant", "leave"):
        process, account = event["process"], event["account"]
        if event["event"] == "wait":
            waiting[process][event["number"]] = account
            continue
        wait = frozenset(waiting[process].values())  # before the grant
        waiting[process].pop(event["number"], None)
        if event["event"] != "grant":
            continue
        grants = window[process]
        grants.append((account, wait))
        if len(grants) == WINDOW_GRANTS:
            yield from _shares(process, grants, event["at"])
            grants.clear()


def _shares(process: str, grants: list[tuple[str, frozenset[str]]], at: float) -> Verdicts:
    always = frozenset.intersection(*(names for _, names in grants))
    counts = [sum(name == one for one, _ in grants) for name in always]
    if len(counts) < 2:
        return
    yield MET
    if sum(counts) ** 2 < 0.95 * len(counts) * sum(count**2 for count in counts):
        yield f"{process} gave {dict(zip(always, counts, strict=True))} of {WINDOW_GRANTS} slots until {at:.1f}"
