"""Cut streams of real servers over real sockets: a seed determines the requests and the cuts of each client."""

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

from tests.reliability.chaos.history import broken_totals
from tests.reliability.cuts.clients import CLIENT, CONNECTION, REPLICA, SIGKILL, SIGTERM, Cut, CutClient
from tests.reliability.cuts.costs import PLACES, Outcome, unfair_costs
from tests.reliability.cuts.servers import CutServer, records_by_account, units_by_account
from tests.support.forks import Forks
from tests.support.processes import card_file

from llama2_server.admission.keys.keys_file import new_key
from llama2_server.card import load_card

CUTS = 50
"""Cuts of each seed."""
RESTARTS = 5
"""Server restarts of each seed."""
CLIENTS = 6
SEED_SECONDS = 900
"""Time after which a seed counts as hung."""
UNLIMITED = {"default": 1_000_000, "accounts": {}}


async def cut_streams(seed: int, forks: Forks, folder: Path, url: str | None = None, cuts: int = CUTS) -> Outcome:
    """Cut streams of one server, or with the URL of a usage store of two replicas, and check text and costs.

    Args:
        seed: determines the settings, the requests and the cuts.
        forks: starts the servers.
        folder: an empty folder for their data.
        url: an empty usage store.
        cuts: number of cuts.

    Raises:
        TimeoutError: the clients hang.
    """
    draw, outcome = random.Random(seed), Outcome()
    accounts = [f"client{number}" for number in range(CLIENTS)]
    api_keys = _write_keys(folder, [*accounts, "whole"])
    servers = _servers(forks, folder, draw, url)
    dealt = _plan(draw, cuts, len(servers))
    model = load_card("demo").name
    clients = [
        CutClient(account, api_keys, model, random.Random(draw.random()), servers, dealt[index::CLIENTS], outcome)
        for index, account in enumerate(accounts)
    ]
    async with AsyncExitStack() as stack:
        for server in servers:
            await server.start()
            stack.push_async_callback(_stop, server, outcome)
            await server.wait_for_fingerprint()
        async with asyncio.timeout(SEED_SECONDS), asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.run())
    units = units_by_account(servers[0].charges)
    records = await records_by_account(url, servers[0].data_directory)
    for client in clients:
        account = client.account
        outcome.broken += unfair_costs(account, client.bills, records.get(account, []), units[account], client.payable)
    for server in servers:
        outcome.broken += broken_totals(server.data_directory)
    return outcome


def _plan(draw: random.Random, cuts: int, servers: int) -> list[Cut]:
    restarts = max(1, cuts * RESTARTS // CUTS)
    kinds = [(SIGKILL, SIGTERM)[number % 2] for number in range(restarts)]
    kinds += [CLIENT] * (cuts // 6) + [REPLICA] * (cuts // 4 if servers > 1 else 0)
    kinds += [CONNECTION] * (cuts - len(kinds))
    draw.shuffle(kinds)
    return [(kind, draw.choice(PLACES)) for kind in kinds]


def _servers(forks: Forks, folder: Path, draw: random.Random, url: str | None) -> list[CutServer]:
    card = card_file(
        folder,
        max_concurrent_requests=draw.choice([1, 2, 4]),
        infer_response_cache=None,
        max_requests_per_min=UNLIMITED,
    )
    options = {
        "card": card,
        "weights": "demo",
        "api-keys-file": folder / "keys.yaml",
        "shutdown-grace-seconds": draw.choice([0, 2]),
        "resume-window-seconds": draw.choice([0, 2, 30]),
    }
    if url is not None:
        options["usage-url"] = url
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    names = ["only"] if url is None else ["left", "right"]
    servers = [CutServer(forks, folder / name, flags, folder / "charges.log") for name in names]
    for server in servers:
        server.replicas = servers
    return servers


def _write_keys(folder: Path, accounts: list[str]) -> dict[str, str]:
    keys = {account: new_key(account) for account in accounts}
    lines = "".join(f"  {entry}\n" for _, entry in keys.values())
    (folder / "keys.yaml").write_text(f"keys:\n{lines}", encoding="utf-8")
    return {account: key for account, (key, _) in keys.items()}


async def _stop(server: CutServer, outcome: Outcome) -> None:
    if (code := await server.stop()) != 0:
        outcome.broken.append(f"a server exited with {code} after SIGTERM")
