"""The figures in docs/scaling.md follow from the card, Llama-2's shape and the assumed speeds."""

import math
import re

from tests.support.repository import ROOT

from llama2_server.card import load_card

DOC = ROOT / "docs/scaling.md"
LAYERS, WIDTH, FEED_FORWARD, VOCABULARY = 32, 4096, 11008, 32000  # Llama-2 7B's published configuration


def erlang_c(servers: int, load: float) -> float:
    """Return the fraction of requests that wait in one queue for several servers."""
    free = sum(load**count / math.factorial(count) for count in range(servers))
    busy = load**servers / math.factorial(servers) * servers / (servers - load)
    return busy / (free + busy)


def wait_in_one_queue(servers: int, seconds: float) -> float:
    """Return the mean wait if requests of that length arrive once per second."""
    return erlang_c(servers, seconds) * seconds / (servers - seconds)


def test_the_worked_example_is_arithmetic() -> None:
    """Each figure of the table follows from the card's limits and the two assumed speeds."""
    text = DOC.read_text()
    prose = " ".join(text.replace("\n> ", "\n").split())
    assumed = re.search(r"Assumed here: ([\d,]+) prompt tokens/s, (\d+) output tokens/s", prose)
    assert assumed
    prefill, decode = (int(speed.replace(",", "")) for speed in assumed.groups())
    _header, *rows = re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text.partition("## Worked example")[2])
    results = {name: figure for name, _, figure in rows}

    card = load_card("llama-2-7b-chat-fp16")
    gib, two_bytes, minute = 2**30, 2, 60
    parameters = 2 * VOCABULARY * WIDTH + WIDTH
    parameters += LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FEED_FORWARD + 2 * WIDTH)
    weights = parameters * two_bytes
    token = 2 * LAYERS * WIDTH * two_bytes
    slot = card.context_length_limit * token
    assert card.max_concurrent_requests == 1
    seconds = 300 / prefill + 200 / decode
    replicas = math.ceil(seconds / 0.7)
    share = seconds / replicas
    longest = (card.context_length_limit - card.sequence_length_limit) / prefill + card.sequence_length_limit / decode
    (neurons,) = {float(cost) for cost in card.neuron_costs.values()}
    quota = card.constellation_config.max_requests_per_min.default
    assert results == {
        "weights": f"{weights / gib:.2f} GiB",
        "KV cache per token": f"{token / 2**20} MiB",
        "KV cache per slot": f"{slot / gib} GiB",
        "memory per replica": f"{(weights + slot) / gib:.2f} GiB",
        "mean request time": f"{seconds:.2f} s",
        "maximum throughput of a replica": f"{minute / seconds:.1f} requests per minute",
        "mean number of busy replicas": f"{seconds:.2f}",
        "replicas at 70% utilization": f"{replicas}",
        "with a spare for a node that fails or is updated": f"{replicas + 1}",
        "mean wait, one queue per replica": f"{share / (1 - share) * seconds:.1f} s",
        "mean wait, one queue for ten replicas": f"{wait_in_one_queue(replicas, seconds):.2f} s",
        "queue size per replica for a wait of 30 s": f"{30 // seconds:.0f}",
        "longest reply": f"{longest:.1f} s",
        "neurons": f"{500 * neurons * minute:,.0f} per minute",
        "usage records": f"{minute * 60 * 24:,} rows per day",
        "quota": f"{minute // quota} accounts",
    }
    eight = wait_in_one_queue(8, seconds)
    assert f"Eight replicas with one queue would still wait only {eight:.2f} s" in prose
    assert f"`shutdown_grace_seconds` of {math.ceil(longest)} or more" in prose
    assert f"200 accounts may send {200 * quota:,} requests per minute" in prose
