"""The figures in docs/scaling.md follow from the card, Llama-2's shape, and the speeds that the page assumes."""

import math
import re

from tests.support.repository import ROOT

from llama2_server.card import load_card

DOC = ROOT / "docs/scaling.md"
LAYERS, WIDTH, FEED_FORWARD, VOCABULARY = 32, 4096, 11008, 32000  # Llama-2 7B's published configuration


def erlang_c(servers: int, load: float) -> float:
    """How many of the callers have to wait, when they wait in one line."""
    free = sum(load**count / math.factorial(count) for count in range(servers))
    busy = load**servers / math.factorial(servers) * servers / (servers - load)
    return busy / (free + busy)


def test_the_worked_example_is_arithmetic() -> None:
    """Each figure of the table, from the card's limits and the two speeds that the doc assumes."""
    text = DOC.read_text()
    assumed = re.search(r"Assumed here: ([\d,]+) prompt tokens/s, (\d+) output tokens/s", text)
    assert assumed
    prefill, decode = (int(speed.replace(",", "")) for speed in assumed.groups())
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text.partition("## One worked example")[2])
    said = {name: figure for name, _, figure in rows}

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
    assert said == {
        "weights": f"{weights / gib:.2f} GiB",
        "KV cache of a token": f"{token / 2**20} MiB",
        "KV cache of a slot": f"{slot / gib} GiB",
        "memory of a replica": f"{(weights + slot) / gib:.2f} GiB",
        "time of a mean request": f"{seconds:.2f} s",
        "most that a replica can do": f"{minute / seconds:.1f} requests a minute",
        "replicas busy in the mean": f"{seconds:.2f}",
        "replicas, 70% busy": f"{replicas}",
        "one to spare, for a node that fails or is updated": f"{replicas + 1}",
        "mean wait, ten lines of their own": f"{share / (1 - share) * seconds:.1f} s",
        "mean wait, one line for ten replicas": f"{erlang_c(replicas, seconds) * seconds / (replicas - seconds):.2f} s",
        "calls in a replica's line for a wait of 30 s": f"{30 // seconds:.0f}",
        "longest reply": f"{longest:.1f} s",
        "neurons": f"{500 * neurons * minute:,.0f} a minute",
        "ledger": f"{minute * 60 * 24:,} rows a day",
        "quota": f"{minute // quota} accounts",
    }
    eight = erlang_c(8, seconds) * seconds / (8 - seconds)
    assert f"Eight replicas behind one line would still wait only {eight:.2f} s" in text
    assert f"`shutdown_grace_seconds` of {math.ceil(longest)} or more" in text
    assert f"200 accounts may by the card ask for {200 * quota:,} requests a minute" in text
