"""Compares our engine and our service with other ways of running the same float16 weights on this CPU.

    python -m benchmarks                                          # everything, then the report
    python -m benchmarks --parts speed --models 1.2b --peers llama.cpp --results FILE    # a part; adds to the file
    python -m benchmarks --checkpoint DIR                         # a checkpoint of your own
    python -m benchmarks.report FILE                              # the report of what was measured before

Parts: speed (decoding after 128 tokens), prefill (of 512), lengths (prompts of 32 to 2,048), requests (1 to 8 at once),
start (from exec to SERVING), chat (the second turn of one). See README.md beside this file.
"""

import argparse
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tools.make_checkpoint import PRESETS, make_checkpoint

from benchmarks import report, results
from benchmarks.engines.peers import Peer, chosen, groups, interpreter
from benchmarks.engines.service import Service
from benchmarks.measurement import service_only
from benchmarks.measurement.disturbance import MAX_ATTEMPTS, Figures
from benchmarks.measurement.interleaved_runs import Case, Ground, Rounds
from benchmarks.reporting.metrics import DECODE_PROMPT, PREFILL_PROMPT
from llama2_server.engine.checkpoint.files import read_config

FOLDER = Path("build/benchmarks")


@dataclass(frozen=True)
class Part:
    """Cases, how many rounds of them, and the peers who take part unless others are asked for."""

    cases: list[Case]
    rounds: int
    peers: str = "all"


PARTS = {
    "speed": Part([Case(DECODE_PROMPT, 48)], rounds=5),
    "prefill": Part([Case(PREFILL_PROMPT, 1)], rounds=5, peers="llama.cpp,openvino"),
    "lengths": Part([Case(tokens, 12) for tokens in (32, 128, 512, 2048)], rounds=3, peers="llama.cpp,openvino bf16"),
    "requests": Part([Case(128, 128, requests) for requests in (1, 2, 4, 8)], rounds=3, peers="llama.cpp f16"),
}
ALONE = {"start": 5, "chat": 5}  # rounds of what only the service does


class Benchmark:
    """What the flags ask for; measurements go into the results file as each part is done."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pythons = dict(given.split("=", 1) for given in arguments.python)
        self._path: Path = arguments.results or Path("benchmarks/results") / f"{time.strftime('%Y-%m-%d')}.json"
        self._results = results.load(self._path, self._threads)

    def run(self) -> Path:
        """Measure all that is wanted; the path of the results."""
        models = [str(self._arguments.checkpoint)] if self._arguments.checkpoint else self._arguments.models.split(",")
        for part in self._arguments.parts.split(","):
            # The longer parts are for the last model only.
            for model in models if part == "speed" else models[-1:]:
                ground = self._ground(model)
                if part in PARTS:
                    self._generations(part, model, ground)
                else:
                    self._alone(part, model, ground)
        return self._path

    def _ground(self, model: str) -> Ground:
        """The model's weights, made where they are not there yet."""
        folder = self._arguments.folder / Path(model).name
        checkpoint = Path(model) if self._arguments.checkpoint else folder / "checkpoint"
        if not (checkpoint / "config.json").exists():
            print(f"Making the weights of {model} …", flush=True)
            make_checkpoint(checkpoint, PRESETS[model])
        folder.mkdir(parents=True, exist_ok=True)
        self._results["weights"][model] = {
            "bytes": _weights_bytes(checkpoint),
            "bytes_a_token": _weights_bytes(checkpoint) - _embedding_bytes(checkpoint),
        }
        return Ground(checkpoint, folder, self._threads, self._arguments.attempts)

    def _generations(self, name: str, model: str, ground: Ground) -> None:
        part = PARTS[name]
        wanted = {}
        for peer in chosen(self._arguments.peers or part.peers):
            python, missing = interpreter(peer, self._pythons)
            if python is None:
                self._results["not_run"][peer.name] = missing
            else:
                wanted[peer] = python
        for group in groups(wanted, _weights_bytes(ground.checkpoint), _free_bytes()):
            self._group(name, model, ground, {peer: wanted[peer] for peer in group})

    def _group(self, name: str, model: str, ground: Ground, peers: Mapping[Peer, str]) -> None:
        with closing(Rounds(ground, PARTS[name].cases, peers)) as rounds:
            self._results["not_run"] |= rounds.not_run
            self._results["contenders"] |= rounds.about()
            label = ", ".join(sorted(set(rounds.about()) - {"engine", "service"}))
            measurements: list[Figures] = []
            for number in range(self._arguments.rounds or PARTS[name].rounds):
                for figures in rounds.run():
                    measurements.append({"part": name, "model": model, "group": label, "round": number} | figures)
                    _say(measurements[-1])
            self._keep(measurements)

    def _alone(self, name: str, model: str, ground: Ground) -> None:
        count = self._arguments.rounds or ALONE[name]
        if name == "start":
            found = [service_only.start_up(ground) for _ in range(count)]
        else:
            with closing(Service(ground.checkpoint, context_length=2048, slots=1)) as service:
                service_only.second_turn(ground, service)  # warm up
                found = [service_only.second_turn(ground, service) for _ in range(count)]
        measurements = [
            {"part": name, "model": model, "group": "", "round": number} | figures
            for number, figures in enumerate(found)
        ]
        for figures in measurements:
            _say(figures)
        self._keep(measurements)

    def _keep(self, measurements: list[Figures]) -> None:
        # Who ran in the end is no longer among those who did not.
        for name in self._results["contenders"]:
            self._results["not_run"].pop(name, None)
        results.add(self._results, measurements)
        results.save(self._results, self._path)


def _weights_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def _embedding_bytes(checkpoint: Path) -> int:
    """What decoding a token does not read, but for one row; 0 where the head is the same matrix."""
    config = read_config(checkpoint)
    return 0 if config.tied_embeddings else config.vocab_size * config.hidden_size * 2


def _free_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _say(figures: Figures) -> None:
    print(" ".join(f"{key}={value}" for key, value in figures.items() if value not in ("", [])), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join([*PARTS, *ALONE]), help="which, with commas")
    parser.add_argument("--models", default="134m,1.2b", help="presets of tools.make_checkpoint, with commas")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's directory instead")
    parser.add_argument("--peers", default="", help='words of their names, with commas, or "all", or "none"')
    parser.add_argument("--rounds", type=int, help="instead of each part's own number")
    parser.add_argument("--attempts", type=int, default=MAX_ATTEMPTS, help="at what other processes disturb")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for weights and their conversions, which are kept")
    parser.add_argument("--results", type=Path, help="the file to add to; today's in benchmarks/results")
    parser.add_argument("--python", action="append", default=[], metavar="FAMILY=PATH", help="a peer family's Python")
    return parser.parse_args()


def main() -> None:
    """Measure, then report."""
    report.write(Benchmark(_arguments()).run())


if __name__ == "__main__":
    main()
