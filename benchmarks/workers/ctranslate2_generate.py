"""CTranslate2's generator in float32 or a 16-bit type; it exits if the CPU does not support the type.

CTranslate2 takes tokens as pieces. It stops at the end of a sequence, which `min_length` suppresses.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.converters import TransformersConverter

from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve


class CTranslate2:
    """A checkpoint in CTranslate2; several prompts form one batch."""

    packages = ("ctranslate2",)

    def __init__(self, setup: Setup) -> None:
        if setup.arithmetic not in ctranslate2.get_supported_compute_types("cpu"):
            raise SystemExit(f"CTranslate2 does not support {setup.arithmetic} on this CPU")
        path = Path(setup.folder) / f"ctranslate2-{setup.arithmetic}"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            converter = TransformersConverter(setup.checkpoint, low_cpu_mem_usage=True)
            converter.convert(str(unfinished), quantization=setup.arithmetic)
            unfinished.replace(path)
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=setup.arithmetic, inter_threads=1, intra_threads=setup.threads
        )
        self.arithmetic = self._generator.compute_type
        self._pieces: list[str] = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Continue all prompts with one call of generate_batch."""
        sampling: dict[str, Any] = {}
        if seed is not None:
            ctranslate2.set_random_seed(seed % 2**32)
            sampling = {"sampling_temperature": TEMPERATURE, "sampling_topp": TOP_P, "sampling_topk": 0}
        started_at = time.perf_counter()
        times: list[float] = []

        def record_time(_: object) -> bool:
            times.append(time.perf_counter())
            return False

        results = self._generator.generate_batch(
            [[self._pieces[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            include_prompt_in_result=False,
            callback=record_time,
            **sampling,
        )
        finished_at = time.perf_counter()
        return Generated(
            [result.sequences_ids[0] for result in results],
            times[len(prompts) - 1] - started_at,
            finished_at - started_at,
        )


if __name__ == "__main__":
    serve(CTranslate2)
