"""Measure steps with several rows on one thread: prompt lookup, and a prompt that arrives among running replies.

    python -m benchmarks.rows --preset 134m --rounds 5

The checkpoints are made in --folder. Times are CPU times of one thread, because other programs change them less than
elapsed time. Each figure is a median of the ratios of interleaved pairs, with the lowest and the highest ratio.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tools.make_checkpoint import PRESETS, Shape, make_checkpoint

from benchmarks.rows import mixed_steps, peers, prompt_lookup
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.lifecycle.checks.checkpoint import demo_checkpoint


def main() -> None:
    """Make the checkpoints, measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="134m")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset, for a busy machine")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="lookup,mixed", help="comma-separated: lookup, mixed, peers")
    arguments = parser.parse_args()
    shape = PRESETS[arguments.preset]
    shape = replace(shape, layers=arguments.layers or shape.layers)
    random_weights = _checkpoint(arguments.folder, arguments.preset, shape)
    copying = _checkpoint(arguments.folder, arguments.preset, replace(shape, cycle=prompt_lookup.CYCLE))
    if "lookup" in arguments.parts:
        print("| reply | plain / prompt lookup | time per token | tokens per step | accepted |\n|---|---|---|---|---|")
        recorded = prompt_lookup.recorded_workloads(Tokenizer(demo_checkpoint() / "tokenizer.model"))
        sampled = prompt_lookup.sampled_workloads("random", (1.0,))
        prompt_lookup.measure(random_weights, [*recorded, *sampled], arguments.rounds)
        prompt_lookup.measure(copying, prompt_lookup.sampled_workloads("copying", (0.6, 1.0, 1.1)), arguments.rounds)
    if "mixed" in arguments.parts:
        print("| limit | plain step | longest gap of the stream | prompt alone | prompt next to the stream |")
        print("|---|---|---|---|---|")
        mixed_steps.measure(random_weights, arguments.rounds)
    if "peers" in arguments.parts:
        print("| library | plain, tokens/s | with prompt lookup | ratio | tokens per step | equal tokens |")
        print("|---|---|---|---|---|---|")
        peers.measure(copying, copying.with_name(f"{copying.name}-converted"), arguments.rounds)


def _checkpoint(folder: Path, preset: str, shape: Shape) -> Path:
    """Return a checkpoint whose weights fit in 12 bits; make it if it does not exist yet."""
    directory = folder / f"{preset}-layers-{shape.layers}-cycle-{shape.cycle}"
    if not directory.exists():
        make_checkpoint(directory, shape, trained_dtype=torch.bfloat16)
    return directory


if __name__ == "__main__":
    main()
