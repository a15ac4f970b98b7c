"""A history by call, by request and by process, and the faults that explain what happened."""

import math
import string
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from functools import cached_property

from tests.reliability.simulation.history import Event, History

Verdicts = Iterator[str | None]
"""The results of a rule: a line per violation, and `MET` per event that it judges."""
MET = None
ENGINE_FAULTS = frozenset(
    {
        "the device for good",
        "the device",
        "a lost KV slot",
        "a hanging step",
        "acquiring the KV slot",
        "submitting",
        "returning the KV slot",
        "SIGTERM",
        "reserving",
        "confirming",
        "decoding a token",
        "the last text",
        "the result",
        "the stop matcher",
        "reporting progress",
    }
)
DISK_FAULTS = frozenset({"a full disk", "a replaced database", "a deleted database", "the checkpoint"})
UNAVAILABLE_CAUSES = {
    "USAGE_UNAVAILABLE": DISK_FAULTS | {"a faulty admission", "the usage store", "replies of the usage store"},
    "QUOTA_STORE_UNAVAILABLE": frozenset({"the quota store", "a slow quota store"}),
    "ENGINE_UNAVAILABLE": ENGINE_FAULTS,
    "SHUTTING_DOWN": ENGINE_FAULTS,
}
KEPT_SECONDS = 2.0
"""How long changes wait in memory after a disk accepts them again, at most."""
HEALTH_CAUSES = {
    "serving": ENGINE_FAULTS | DISK_FAULTS,
    "quota-store": frozenset({"the quota store", "a slow quota store"}),
    "usage-store": frozenset({"the usage store", "replies of the usage store", "a poison record"}),
}


class Facts:
    """A history by call, by request id and by process."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.shape = next(history.of("shape"))
        self.calls = {event["call"]: event for event in history.of("call")}
        self.ends: dict[int, Event] = {}
        self.twice_ended: list[int] = []
        for event in history.of("end"):
            if event["call"] in self.ends:
                self.twice_ended.append(event["call"])
            self.ends[event["call"]] = event
        self.arrivals = {event["id"]: event for event in history.of("arrive")}
        self.records: dict[str, list[Event]] = defaultdict(list)
        for event in history.of("record"):
            self.records[event["id"]].append(event)
        self.faults_by_process: list[tuple[str, str, float, float]] = []
        started: dict[int, Event] = {}
        for event in history.of("fault", "fault end"):
            if event["event"] == "fault":
                started[event["number"]] = event
            else:
                first = started[event["number"]]
                self.faults_by_process.append((first["fault"], first["process"], first["at"], event["at"]))
        self.raised_at: dict[str, list[float]] = defaultdict(list)
        for event in history.of("raised"):
            self.raised_at[event["process"]].append(event["at"])
        self.killed = {event["process"]: event["at"] for event in history.of("kill")}
        self.started: dict[str, float] = {}
        for event in history.of("start"):
            self.started.setdefault(event["process"], event["at"])
        self.ended: dict[str, float] = {}
        for event in history.of("end of process", "kill", "exit"):
            self.ended.setdefault(event["process"], event["at"])
        self.disturbed: dict[str, list[float]] = defaultdict(list)
        for event in history.of("raised", "fault", "fault end", "exit", "kill", "end of process"):
            self.disturbed[event.get("process", "")].append(event["at"])

    @cached_property
    def long_holds(self) -> dict[str, list[tuple[float, float]]]:
        """By process, when slots were held for over twice the mean of all."""
        granted: dict[tuple[str, int], float] = {}
        holds: list[tuple[str, float, float]] = []
        for event in self.history.of("grant", "release"):
            key = (event["process"], event["number"])
            if event["event"] == "grant":
                granted[key] = event["at"]
            elif key in granted:
                holds.append((event["process"], granted.pop(key), event["at"]))
        mean = sum(end - start for _, start, end in holds) / max(1, len(holds))
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for process, start, end in holds:
            if end - start > 2 * mean:
                found[process].append((start, end))
        return found

    def price(self, reply: Event) -> Decimal:
        """Return the neurons of the tokens of a reply or a record; cached ones are free."""
        costs = self.shape["costs"]
        inputs, outputs = reply["usage"]
        price = inputs * Decimal(costs["input_tokens"]) + outputs * Decimal(costs["output_tokens"])
        return Decimal(0) if reply["cached"] else price

    def lasts(self, faults: frozenset[str], since: float, until: float) -> bool:
        """Return whether one of the faults is in progress at some time in between."""
        return any(name in faults and start <= until and since <= end for name, _, start, end in self.faults_by_process)

    def absent(self, process: str, since: float, until: float) -> bool:
        """Return whether the process has not started or ends at some time in between."""
        return since < self.started.get(process, math.inf) or self.ended.get(process, math.inf) <= until

    def is_lost_in_memory(self, process: str, ended_at: float) -> bool:
        """Return whether a process was killed while the end of a call waited in its memory for the disk."""
        killed_at = self.killed.get(process, math.inf)
        return any(
            name in DISK_FAULTS
            and faulty.rstrip(string.digits) == process.rstrip(string.digits)
            and start <= ended_at <= killed_at <= end + KEPT_SECONDS
            for name, faulty, start, end in self.faults_by_process
        )

    def raised(self, process: str, since: float, until: float) -> bool:
        """Return whether a fault was injected into the process in this time."""
        return any(since <= at <= until for at in self.raised_at[process])
