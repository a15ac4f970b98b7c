"""The model of the service: what its users rely on, checked against a history.

Each rule reads the whole history. It yields one line per violation, and `MET` for each event that it judges: a rule
that meets no event proves nothing. A rule knows nothing of the server's code: only calls and their ends, the slots that
were granted, the quota that was consumed, health, and the records in the end.
"""

from collections import Counter
from typing import NamedTuple

from tests.reliability.simulation.history import History
from tests.reliability.simulation.model import calls, processes, queue
from tests.reliability.simulation.model.facts import MET, Facts

RULES = (
    calls.every_call_ends,
    calls.unavailability_has_a_cause,
    calls.statuses_are_true,
    calls.keys_are_accepted,
    calls.replies_are_exact,
    calls.one_record_per_request,
    calls.records_are_exact,
    calls.totals_are_exact,
    queue.slots_are_limited_and_free_again,
    queue.slots_are_used,
    queue.quota_is_never_exceeded,
    queue.retry_times_are_kept,
    queue.accounts_share_the_slots,
    processes.health_is_true,
    processes.health_shows_faults,
    processes.processes_end_for_a_reason,
    processes.metrics_are_exact,
)


class Judgment(NamedTuple):
    """The violations of a history, and the events that the rules judged."""

    violations: list[str]
    met: Counter[str]
    """By rule, the number of events that it judged."""
    broken_promises: int
    """Calls that returned in time and were rejected again, within the exceptions."""


def judge(history: History) -> Judgment:
    """Apply all rules."""
    facts = Facts(history)
    found: list[str] = []
    met: Counter[str] = Counter()
    for rule in RULES:
        verdicts = list(rule(facts))
        found += [f"{rule.__name__}: {line}" for line in verdicts if line is not MET]
        met[rule.__name__] = verdicts.count(MET)
    return Judgment(found, met, len(queue.promises(facts)[1]))


def violations(history: History) -> list[str]:
    """Return the violations of all rules."""
    return judge(history).violations
