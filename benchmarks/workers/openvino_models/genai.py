"""OpenVINO GenAI's pipeline on float16 weights that optimum-intel exports, with quantization turned off."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.workers.openvino_models.infer import export_model
from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve

GUESSES = 15  # as many as our engine checks; the library has no default
MAX_MATCH_TOKENS = 3  # as in the library's sample


class _Times(openvino_genai.StreamerBase):  # type: ignore[misc] # the library has no types
    """A streamer that records the time of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, _: object) -> Any:
        """Take one token or several."""
        self.times.append(time.perf_counter())
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Take the end of the reply."""


class OpenVinoGenai:
    """A checkpoint in OpenVINO GenAI."""

    packages = ("openvino-genai", "openvino", "optimum-intel")

    def __init__(self, setup: Setup) -> None:
        path = Path(setup.folder) / "openvino"
        if not (path / "openvino_model.bin").exists():
            export_model(Path(setup.checkpoint), path)
        if not (path / "openvino_tokenizer.xml").exists():
            _export_tokenizer(Path(setup.checkpoint), path)
        self.arithmetic = f"float16 weights, {setup.arithmetic}"
        self._prompt_lookup = setup.prompt_lookup
        self._pipeline: Any = openvino_genai.LLMPipeline(
            str(path),
            "CPU",
            INFERENCE_PRECISION_HINT=setup.arithmetic,
            KV_CACHE_PRECISION="bf16" if setup.arithmetic == "bf16" else "f16",
            DYNAMIC_QUANTIZATION_GROUP_SIZE="0",
            INFERENCE_NUM_THREADS=setup.threads,
            PERFORMANCE_HINT="LATENCY",
            **({"prompt_lookup": True} if setup.prompt_lookup else {}),
        )

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Continue all prompts with one call of generate; only a single prompt has a time of its first token."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, seed is not None
        if seed is not None:
            config.temperature, config.top_p, config.rng_seed = TEMPERATURE, TOP_P, seed % 2**63
        if self._prompt_lookup:
            config.num_assistant_tokens, config.max_ngram_size = GUESSES, MAX_MATCH_TOKENS
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        streamer = _Times() if len(prompts) == 1 else None
        started_at = time.perf_counter()
        output = self._pipeline.generate(inputs, config, streamer)
        finished_at = time.perf_counter()
        first_token_at = streamer.times[0] if streamer else finished_at
        return Generated(
            [list(reply) for reply in output.tokens], first_token_at - started_at, finished_at - started_at
        )


def _export_tokenizer(checkpoint: Path, path: Path) -> None:
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    models = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    for model, name in zip(models, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, path / f"openvino_{name}.xml")


if __name__ == "__main__":
    serve(OpenVinoGenai)
