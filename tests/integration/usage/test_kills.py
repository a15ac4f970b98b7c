"""A reply whose last message was sent has its exact record, whenever the server is killed."""

import subprocess
import sys
from pathlib import Path

from tests.integration.usage.conftest import stored
from tests.integration.usage.expected_records import FINISHED

from llama2_server.usage.records import INTERRUPTED

KILLS = 40
# Each server is a fork that has everything imported. It reports a request at the time of its reply's last message.
PROGRAM = """
import asyncio, os, random, signal, sys
from decimal import Decimal
from pathlib import Path
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.000000001")}

async def serve(directory, life, told):
    ledger = await Ledger.open(data_directory=directory, neuron_costs=COSTS)

    async def call(number):
        request_id = f"{life}.{number}"
        await ledger.admit(request_id, "acme", "model")
        for token in range(1, 6):
            ledger.progress(request_id, TokenUsage(3, token))
            await asyncio.sleep(0)
        ledger.finish(request_id, "MAX_TOKENS", TokenUsage(3, 5))
        await ledger.commit()
        os.write(told, f"{request_id}\\n".encode())

    number = 0
    while True:
        await asyncio.gather(*(call(number + one) for one in range(4)))
        number += 4

draw = random.Random(1)
for life in range(int(sys.argv[2])):
    reader, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        asyncio.run(serve(Path(sys.argv[1]), life, told))
    os.close(told)
    with os.fdopen(reader) as lines:
        for _ in range(draw.randrange(1, 12)):
            print(lines.readline(), end="")
        os.kill(child, signal.SIGKILL)
        print(lines.read(), end="")
    os.waitpid(child, 0)
"""


async def test_sigkill_at_completion(tmp_path: Path) -> None:
    """After SIGKILL at the moment of a last message, each request whose end was sent has its exact record."""
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(KILLS)], capture_output=True, text=True, check=True
    )
    told = killed.stdout.split()
    assert len(told) >= KILLS
    found = {record.request_id: record for record in await stored(None, tmp_path)}
    assert set(told) <= set(found)
    for request_id in told:
        FINISHED.check(found[request_id])
    others = found.keys() - set(told)
    assert all(found[name].outcome in (INTERRUPTED, FINISHED.outcome) for name in others)
