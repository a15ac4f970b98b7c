"""Expected usage records of requests, and checks of stored records."""

import asyncio
from dataclasses import dataclass

from tests.integration.usage.conftest import COSTS, RECOVERY_TIMEOUT_SECONDS

from llama2_server.usage.ledger import PROGRESS_TOKENS, Ledger
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage, neurons
from llama2_server.usage.records import INTERRUPTED, UsageRecord


@dataclass
class Expected:
    """Expected usage record of one request."""

    account_id: str
    tokens: TokenUsage = ZERO_TOKENS
    outcome: str = INTERRUPTED  # unless it finishes
    cached: bool = False

    def check(self, record: UsageRecord) -> None:
        """Check a record: exact for a finished request, within the documented loss for an interrupted request."""
        assert (record.account_id, record.outcome) == (self.account_id, self.outcome)
        assert (record.cached, record.input_tokens) == (self.cached, self.tokens.input_tokens)
        lost = self.tokens.output_tokens - record.output_tokens
        assert lost == 0 if self.outcome != INTERRUPTED else 0 <= lost < PROGRESS_TOKENS
        computed = TokenUsage(record.input_tokens, record.output_tokens)
        assert record.neurons == (0 if self.cached else neurons(computed, COSTS))


FINISHED = Expected("acme", TokenUsage(3, 5), "MAX_TOKENS")
"""The record of `record_request`."""


def check_all(records: list[UsageRecord], expected: dict[str, Expected]) -> None:
    """Check that each request has exactly its expected record."""
    by_id = {record.request_id: record for record in records}
    assert len(by_id) == len(records)
    assert by_id.keys() == expected.keys()
    for request_id, one in expected.items():
        one.check(by_id[request_id])


async def record_request(ledger: Ledger, request_id: str, account_id: str = "acme", outputs: int = 5) -> None:
    """Admit and finish one request, and wait until its record is durable."""
    await ledger.admit(request_id, account_id, "model")
    ledger.finish(request_id, "MAX_TOKENS", TokenUsage(3, outputs))
    await ledger.commit()


async def until_writable(ledger: Ledger) -> None:
    """Wait until the ledger accepts records."""
    async with asyncio.timeout(RECOVERY_TIMEOUT_SECONDS):
        while not ledger.disk_writable:
            await ledger.probe_disk()
