"""Rules about health, the end of processes, and metrics."""

from decimal import Decimal

from tests.reliability.simulation.history import Event
from tests.reliability.simulation.model.calls import ENGINE_SECONDS
from tests.reliability.simulation.model.facts import ENGINE_FAULTS, HEALTH_CAUSES, MET, Facts, Verdicts

HEALTH_SECONDS = 15.0


def health_is_true(facts: Facts) -> Verdicts:
    """A process that is not disturbed serves; a call that it cannot serve has a cause that health shows, too."""
    last: dict[str, Event] = {}
    for event in facts.history.of("health"):
        before = last.get(event["process"])
        last[event["process"]] = event
        if before is None or event["at"] - before["at"] < HEALTH_SECONDS:
            continue
        yield MET
        for name, causes in HEALTH_CAUSES.items():
            quiet = not facts.lasts(causes, before["at"], event["at"])
            if not before[name] and quiet and not facts.absent(event["process"], before["at"], event["at"]):
                yield f"{name} of {event['process']} was false from {before['at']:.1f} to {event['at']:.1f}"


def health_shows_faults(facts: Facts) -> Verdicts:
    """A process whose disk is full for 4 s is NOT_SERVING."""
    for name, process, start, end in facts.faults_by_process:
        if name != "a full disk" or end - start <= 4 or facts.absent(process, start, end):
            continue
        yield MET
        health = [event for event in facts.history.of("health") if event["process"] == process and event["at"] <= end]
        before = [event["serving"] for event in health if event["at"] < start]
        # The disk may have been full before, too; then the health does not change.
        serving = before[-1:] + [event["serving"] for event in health if event["at"] >= start]
        if all(serving):
            yield f"{process} was SERVING with a full disk from {start:.1f} to {end:.1f}"


def processes_end_for_a_reason(facts: Facts) -> Verdicts:
    """No process ends with an exception, and the engine ends one (exit code 70) only after a fault."""
    for event in facts.history.of("crash"):
        yield f"{event['process']} ended with {event['reason']}"
    for event in facts.history.of("end of process"):
        yield MET
        since = event["at"] - ENGINE_SECONDS
        explained = facts.raised(event["process"], since, event["at"])
        if event["code"] == 70 and not explained and not facts.lasts(ENGINE_FAULTS, since, event["at"]):
            yield f"the engine of {event['process']} ended it without a fault at {event['at']:.1f}"


def metrics_are_exact(facts: Facts) -> Verdicts:
    """The counters of a process that lives in the end agree with its calls and their records."""
    failed = {event["process"] for event in facts.history.of("raised") if event["fault"].startswith("telemetry")}
    for state in facts.history.of("state"):
        if state["process"] in failed:
            continue
        yield MET
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
