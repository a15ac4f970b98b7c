"""Compare our engine and our service with other ways to run the same float16 weights on this CPU.

The requests are the default ones, with the card's sampling; the part "speed" also measures greedy ones.

    python -m benchmarks                                          # all parts, then the report
    python -m benchmarks --parts speed --models 1.2b --peers llama.cpp --results FILE    # one part; adds to the file
    python -m benchmarks --checkpoint DIR                         # with your own checkpoint
    python -m benchmarks.report FILE                              # the report of existing measurements

Parts: speed (decoding after 128 tokens), prefill (512 tokens), lengths (prompts of 32 to 2,048 tokens), requests (1 to
8 concurrent requests), start (from exec to SERVING), chat (the second turn of a chat). See benchmarks/README.md.
"""

import argparse
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report, results
from benchmarks.engines.peers import Peer, find_interpreter, group_by_memory, select_peers
from benchmarks.engines.service import Service
from benchmarks.measurement import service_only
from benchmarks.measurement.disturbance import MAX_ATTEMPTS, Measurement
from benchmarks.measurement.interleaved_runs import Environment, InterleavedRuns, Workload
from benchmarks.models import MODELS, make_model
from benchmarks.reporting.goals import LARGE
from benchmarks.reporting.metrics import DECODE_PROMPT_TOKENS, PREFILL_PROMPT_TOKENS
from llama2_server.engine.checkpoint.files import read_config

FOLDER = Path("build/benchmarks")


@dataclass(frozen=True)
class Part:
    """Workloads, the number of rounds, and the default peers."""

    workloads: list[Workload]
    rounds: int
    peers: str = "all"


PARTS = {
    "speed": Part([Workload(DECODE_PROMPT_TOKENS, 48), Workload(DECODE_PROMPT_TOKENS, 48, greedy=True)], rounds=5),
    "prefill": Part([Workload(PREFILL_PROMPT_TOKENS, 1)], rounds=5, peers="llama.cpp,openvino"),
    "lengths": Part(
        [Workload(tokens, 12) for tokens in (32, 128, 512, 2048)], rounds=3, peers="llama.cpp,openvino bf16"
    ),
    "requests": Part([Workload(128, 128, requests) for requests in (1, 2, 4, 8)], rounds=3, peers="llama.cpp f16"),
}
SERVICE_ONLY_ROUNDS = {"start": 5, "chat": 5}


class Benchmark:
    """The parts that the command line selects; measurements are saved after each part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pythons = dict(given.split("=", 1) for given in arguments.python)
        self._path: Path = arguments.results or Path("benchmarks/results") / f"{time.strftime('%Y-%m-%d')}.json"
        self._results = results.load(self._path, self._threads)

    def run(self) -> Path:
        """Measure the selected parts and return the path of the results file."""
        models = [str(self._arguments.checkpoint)] if self._arguments.checkpoint else self._arguments.models.split(",")
        large = models[-1] if LARGE not in models else LARGE
        for part in self._arguments.parts.split(","):
            # Because the other parts take longer, they run for one model only.
            for model in models if part == "speed" else [large]:
                environment = self._environment(model)
                if part in PARTS:
                    self._compare(part, model, environment)
                else:
                    self._measure_service(part, model, environment)
        return self._path

    def _environment(self, model: str) -> Environment:
        """Return the environment of a model; make its weights if they do not exist yet."""
        made = None if self._arguments.checkpoint else MODELS[model]
        folder = self._arguments.folder / (made.folder_name if made else Path(model).name)
        checkpoint = folder / "checkpoint" if made else Path(model)
        if made and not (checkpoint / "config.json").exists():
            print(f"making the weights of {model} …", flush=True)
            make_model(checkpoint, made)
        folder.mkdir(parents=True, exist_ok=True)
        self._results["weights"][model] = {
            "bytes": _weights_bytes(checkpoint),
            "bytes_a_token": _weights_bytes(checkpoint) - _embedding_bytes(checkpoint),
        }
        return Environment(checkpoint, folder, self._threads, self._arguments.attempts)

    def _compare(self, name: str, model: str, environment: Environment) -> None:
        part = PARTS[name]
        pythons = {}
        for peer in select_peers(self._arguments.peers or part.peers):
            python, reason = find_interpreter(peer, self._pythons)
            if python is None:
                self._results["not_run"][peer.name] = reason
            else:
                pythons[peer] = python
        for group in group_by_memory(pythons, _weights_bytes(environment.checkpoint), _available_bytes()):
            self._compare_group(name, model, environment, {peer: pythons[peer] for peer in group})

    def _compare_group(self, name: str, model: str, environment: Environment, peers: Mapping[Peer, str]) -> None:
        with closing(InterleavedRuns(environment, PARTS[name].workloads, peers)) as runs:
            self._results["not_run"] |= runs.not_run
            self._results["contenders"] |= runs.describe()
            label = ", ".join(sorted(set(runs.describe()) - {"engine", "service"}))
            measurements: list[Measurement] = []
            for number in range(self._arguments.rounds or PARTS[name].rounds):
                for measurement in runs.run_round():
                    measurements.append({"part": name, "model": model, "group": label, "round": number} | measurement)
                    _print(measurements[-1])
            self._save(measurements)

    def _measure_service(self, name: str, model: str, environment: Environment) -> None:
        count = self._arguments.rounds or SERVICE_ONLY_ROUNDS[name]
        if name == "start":
            found = [service_only.start_up(environment) for _ in range(count)]
        else:
            with closing(Service(environment.checkpoint, context_length=2048, slots=1)) as service:
                service_only.second_turn(environment, service)  # warm up
                found = [service_only.second_turn(environment, service) for _ in range(count)]
        measurements = [
            {"part": name, "model": model, "group": "", "round": number} | measurement
            for number, measurement in enumerate(found)
        ]
        for measurement in measurements:
            _print(measurement)
        self._save(measurements)

    def _save(self, measurements: list[Measurement]) -> None:
        # A peer that was skipped in an earlier run may have run in this one.
        for name in self._results["contenders"]:
            self._results["not_run"].pop(name, None)
        results.add(self._results, measurements)
        results.save(self._results, self._path)


def _weights_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def _embedding_bytes(checkpoint: Path) -> int:
    """Return the size of the embedding, of which a token reads one row; 0 if the output layer is the same matrix."""
    config = read_config(checkpoint)
    return 0 if config.tied_embeddings else config.vocab_size * config.hidden_size * 2


def _available_bytes() -> int:
    """Return the memory that is available without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _print(measurement: Measurement) -> None:
    print(" ".join(f"{key}={value}" for key, value in measurement.items() if value not in ("", [])), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ",".join([*PARTS, *SERVICE_ONLY_ROUNDS])
    parser.add_argument("--parts", default=parts, help="comma-separated parts")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names in benchmarks/models.py")
    parser.add_argument("--checkpoint", type=Path, help="directory of a checkpoint, instead of --models")
    parser.add_argument("--peers", default="", help='comma-separated words of peer names, or "all", or "none"')
    parser.add_argument("--rounds", type=int, help="number of rounds, instead of the default of each part")
    parser.add_argument("--attempts", type=int, default=MAX_ATTEMPTS, help="maximum attempts per disturbed measurement")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder that keeps weights and converted weights")
    parser.add_argument("--results", type=Path, help="results file to add to; by default today's in benchmarks/results")
    parser.add_argument(
        "--python", action="append", default=[], metavar="FAMILY=PATH", help="Python interpreter of a peer family"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, then write the report."""
    report.write_report(Benchmark(_parse_arguments()).run())


if __name__ == "__main__":
    main()
