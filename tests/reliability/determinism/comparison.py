"""Compare the texts of many runs: equal where the fingerprint is, and another fingerprint wherever a text differs."""

import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.reliability.determinism.texts import MIN_TOKENS, Run, Texts, compute
from tests.support.processes import environment
from tests.support.repository import ROOT

from llama2_server.engine.model.weight_layout import AMX as AMX_INSTRUCTIONS
from llama2_server.engine.native.library import NativeUnavailable, find_instructions

TORCH = {"cpu_kernels": "torch"}
AMX = {"cpu_kernels": "amx"}
AMX_RUNS: Sequence[Run] = (
    Run("amx, 1 row", settings=AMX),
    Run("amx, 5 rows, reuse", 5, reuse=True, settings=AMX),
    Run("amx, 8 rows, 2 threads, 16 bits", 8, threads=2, settings={**AMX, "cpu_weight_bits": "16"}),
)
"""Only on a processor with AMX."""


def amx_runs() -> Sequence[Run]:
    """Return the runs with AMX, if this processor supports it."""
    try:
        find_instructions(AMX_INSTRUCTIONS)
    except NativeUnavailable:
        return ()
    return AMX_RUNS


SHARE = 3
"""Runs in torch compute a third of the requests."""
RUNS: Sequence[Run] = (
    *(Run(f"native, {rows} rows", rows) for rows in (1, 4, 7)),
    *(Run(f"native, {rows} rows, reuse", rows, reuse=True) for rows in (1, 3, 6, 8)),
    Run("native, 2 rows, 12 bits", 2, settings={"cpu_weight_bits": "12"}),
    Run("native, 5 rows, 16 bits, reuse", 5, reuse=True, settings={"cpu_weight_bits": "16"}),
    Run("native, 2 threads", 8, threads=2),
    Run("native, another process, reuse", 3, reuse=True, other_process=True),
    Run("torch, 1 row", settings=TORCH, share=SHARE),
    Run("torch, 5 rows, reuse", 5, reuse=True, settings=TORCH, share=SHARE),
    Run("torch, 8 rows, another process", 8, other_process=True, settings=TORCH, share=SHARE),
    Run("torch, 2 threads", 2, threads=2, settings=TORCH, share=SHARE),
    Run("float32", 2, settings={"dtype": "float32"}, share=SHARE),
    Run("bfloat16", 3, reuse=True, settings={"dtype": "bfloat16"}, share=SHARE),
    Run("other weights", 4, weights=1),
    *amx_runs(),
)
FINGERPRINTS = 7 if amx_runs() else 6
"""Of these runs: native, torch with one thread and with two, two other precisions, other weights, and AMX."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a comparison."""

    texts: int
    fingerprints: int
    differing_fingerprints: int
    """Pairs of fingerprints between which at least one text differs."""
    reused_tokens: int
    problems: list[str]


def compare(texts: int, folder: Path, say: Callable[[str], object] = lambda _: None) -> Report:
    """Generate at least this number of texts in all runs, and compare those of equal fingerprints."""
    requests = math.ceil(texts / sum(1 / run.share for run in RUNS) / SHARE) * SHARE
    by_fingerprint: dict[str, list[tuple[Run, Texts]]] = defaultdict(list)
    for run in RUNS:
        count = requests // run.share
        result = _in_another_process(run, count, folder) if run.other_process else compute(run, count, folder)
        by_fingerprint[result.fingerprint].append((run, result))
        say(f"{run.name}: {count} texts, fingerprint {result.fingerprint[:8]}, {result.reused_tokens} tokens reused")
    problems = [problem for group in by_fingerprint.values() for problem in _problems(group)]
    first = [group[0][1].token_ids for group in by_fingerprint.values()]
    pairs = sum(_differ(one, other) for index, one in enumerate(first) for other in first[:index])
    reused = sum(result.reused_tokens for group in by_fingerprint.values() for _, result in group)
    return Report(sum(requests // run.share for run in RUNS), len(by_fingerprint), pairs, reused, problems)


def _differ(one: list[list[int]], other: list[list[int]]) -> bool:
    """Return whether a text of the requests that both have computed differs."""
    return any(found != wanted for found, wanted in zip(one, other, strict=False))


def _problems(group: list[tuple[Run, Texts]]) -> Iterable[str]:
    """Yield each text of the runs of one fingerprint that differs from the first run's, or is too short."""
    reference, expected = group[0]
    for run, result in group:
        for index, (found, wanted) in enumerate(zip(result.token_ids, expected.token_ids, strict=False)):
            if found != wanted:
                yield f"request {index}: {run.name} and {reference.name} have one fingerprint and other texts"
            if len(found) < MIN_TOKENS:
                yield f"request {index}: {run.name} has {len(found)} tokens, expected at least {MIN_TOKENS}"


def _in_another_process(run: Run, count: int, folder: Path) -> Texts:
    command = [sys.executable, "-m", "tests.reliability.determinism", "--run", json.dumps(asdict(run))]
    command += ["--texts", str(count), "--folder", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return Texts(**json.loads(result.stdout))
