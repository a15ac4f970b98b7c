"""The outcome of streams that break off, and the check of their costs: each reply costs as much as one call."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.idempotency.key_accounting import FREE_RECOMPUTATIONS

MAX_CUTS = FREE_RECOMPUTATIONS
"""Cuts per reply. Restarts for the cuts of other replies can break it off more often."""
BEFORE_TEXT, AFTER_DELTA, BEFORE_COMPLETION = "before the first text", "after a delta", "before the completion"
PLACES = (BEFORE_TEXT, AFTER_DELTA, AFTER_DELTA, AFTER_DELTA, BEFORE_COMPLETION)
"""Places of cuts, as often as they are drawn."""


@dataclass
class Outcome:
    """The result of one run."""

    cuts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind and place."""
    replies: int = 0
    computations: int = 0
    """Generations that held a slot: the replies, those without a cut, and the recomputations."""
    broken: list[str] = field(default_factory=list)
    """Broken promises."""


@dataclass(frozen=True)
class Bill:
    """The cost of one call: by its completion, or by its usage record."""

    request_id: str
    input_tokens: int
    output_tokens: int
    neurons: Decimal

    @classmethod
    def told(cls, completion: pb.Completion) -> "Bill":
        """Return what a completion states."""
        usage = completion.usage
        return cls(completion.request_id, usage.input_tokens, usage.output_tokens, Decimal(usage.neurons))

    @property
    def cost(self) -> tuple[int, int, Decimal]:
        """The tokens and the price."""
        return self.input_tokens, self.output_tokens, self.neurons


def unfair_costs(
    account: str, replies: Sequence[Bill], records: Sequence[Bill], units: int, payable: Collection[str] = ()
) -> Iterator[str]:
    """Yield a line for each cost of an account that differs from one record and one quota unit per reply.

    Args:
        account: its name.
        replies: what the completions of its replies state, one for each idempotency key.
        records: its usage records.
        units: the units of its quota that were consumed and not given back.
        payable: the ids of recomputations that cost a record and a quota unit, if they took place.
    """
    recomputed = [record for record in records if record.request_id in payable]
    told, paid = Counter(replies), Counter(records) - Counter(recomputed)
    if told != paid:
        yield f"{account} has the records {list((paid - told).elements())} instead of {list((told - paid).elements())}"
    if units != len(replies) + len(recomputed):
        paid_again = f" and {len(recomputed)} paid recomputations" if recomputed else ""
        yield f"{account} consumed {units} units of its quota for {len(replies)} replies{paid_again}"


def payable_recomputations(request_id: str, attempts: int) -> Iterator[str]:
    """Yield the ids of the records that the recomputations of a call can have, by its number of attempts."""
    for number in range(FREE_RECOMPUTATIONS + 1, attempts):
        yield f"{request_id}-{number}"


def same_completion(first: pb.Completion, second: pb.Completion) -> bool:
    """Return whether two completions are equal, except for their timings."""
    one, other = pb.Completion(), pb.Completion()
    one.CopyFrom(first)
    other.CopyFrom(second)
    one.ClearField("timings")
    other.ClearField("timings")
    return one == other
