"""OpenVINO on float16 weights that optimum-intel exports, called without optimum's generation loop.

By default the CPU plugin stores keys and values in 8 bits and quantizes activations, and optimum-intel quantizes the
weights of large models. All three are turned off. As in OpenVINO GenAI, logits are computed for the last token only.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset15

from benchmarks.workers.protocol import Generated, Setup, serve
from benchmarks.workers.sampling import NucleusSampler


class OpenVino:
    """A checkpoint in OpenVINO; several prompts form one batch."""

    packages = ("openvino", "optimum-intel")

    def __init__(self, setup: Setup) -> None:
        path = Path(setup.folder) / "openvino"
        if not (path / "openvino_model.bin").exists():
            export_model(Path(setup.checkpoint), path)
        core = openvino.Core()
        model = core.read_model(path / "openvino_model.xml")
        _only_last_logits(model)
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": setup.arithmetic,
                "KV_CACHE_PRECISION": "bf16" if setup.arithmetic == "bf16" else "f16",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
                "INFERENCE_NUM_THREADS": setup.threads,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != setup.arithmetic:
            raise SystemExit(f"OpenVINO computes in {used} instead of {setup.arithmetic} on this CPU")
        cache = compiled.get_property("KV_CACHE_PRECISION").get_type_name()
        self.arithmetic = f"float16 weights, {used} (keys and values {cache})"
        self._request: Any = compiled.create_infer_request()
        self._samplers: list[NucleusSampler] = []
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Prefill all prompts together, then decode them together."""
        self._request.reset_state()
        self._samplers = [NucleusSampler(None if seed is None else seed + index) for index in range(len(prompts))]
        length = len(prompts[0])
        started_at = time.perf_counter()
        latest = self._step(np.array(prompts), 0)
        first_token_at = time.perf_counter()
        replies = [latest]
        for position in range(length, length + tokens - 1):
            latest = self._step(latest[:, None], position)
            replies.append(latest)
        seconds = time.perf_counter() - started_at
        return Generated(np.stack(replies, axis=1).tolist(), first_token_at - started_at, seconds)

    def _step(self, token_ids: NDArray[Any], position: int) -> NDArray[Any]:  # (rows, tokens) -> (rows,)
        rows, count = token_ids.shape
        inputs = {
            "input_ids": token_ids,
            "attention_mask": np.ones((rows, position + count), dtype=np.int64),
            "position_ids": np.tile(np.arange(position, position + count), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._inputs}, share_inputs=True)
        logits = self._request.get_tensor("logits").data  # (rows, 1, vocab_size)
        return np.array([sampler.sample(row) for sampler, row in zip(self._samplers, logits[:, -1], strict=True)])


def export_model(checkpoint: Path, path: Path) -> None:
    """Export a checkpoint to OpenVINO's format, without quantization."""
    import torch
    from optimum.intel.openvino import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, dtype=torch.float16
    )
    model.save_pretrained(path)


def _only_last_logits(model: Any) -> None:
    """Slice the input of the output layer, (rows, tokens, hidden), to the last token."""
    head = model.output("logits").node.input_value(0).node
    while head.get_type_name() != "MatMul":  # a conversion to float32 may follow it
        head = head.input_value(0).node
    last = opset15.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    serve(OpenVino)
