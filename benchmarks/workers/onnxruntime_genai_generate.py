"""ONNX Runtime GenAI in float32, its only exact type for CPUs: its model builder converts the checkpoint."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve


class OnnxRuntimeGenai:
    """A checkpoint in ONNX Runtime GenAI; several prompts form one batch."""

    packages = ("onnxruntime-genai",)
    arithmetic = "float32"

    def __init__(self, setup: Setup) -> None:
        path = Path(setup.folder) / "onnxruntime-genai"
        if not (path / "genai_config.json").exists():
            options = ["-i", setup.checkpoint, "-o", str(path), "-p", "fp32", "-e", "cpu", "-c", f"{path}-cache"]
            subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *options], check=True)
        config = onnxruntime_genai.Config(str(path))
        threads = {"intra_op_num_threads": setup.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model: Any = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Prefill all prompts together, then decode them together."""
        length = len(prompts[0]) + tokens
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        options: dict[str, Any] = {"do_sample": False}
        if seed is not None:
            options = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
            options["random_seed"] = seed % 2**31
        parameters.set_search_options(min_length=length, max_length=length, batch_size=len(prompts), **options)
        started_at = time.perf_counter()
        generator = onnxruntime_genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        generator.generate_next_token()
        first_token_at = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        finished_at = time.perf_counter()
        replies = [list(generator.get_sequence(row))[len(prompts[0]) :] for row in range(len(prompts))]
        return Generated(
            [[int(token) for token in reply] for reply in replies],
            first_token_at - started_at,
            finished_at - started_at,
        )


if __name__ == "__main__":
    serve(OnnxRuntimeGenai)
