"""Each kernel of the decode step alone: where the time goes if a step misses its goal.

On a CPU, one variant of each runs in Triton's interpreter, which tests this module.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama2_server.engine.cuda import attention_kernels
from llama2_server.engine.cuda.autotune import ROUNDS, fastest_variant, graph_timer, matmul_workloads
from llama2_server.engine.cuda.forward import CudaForward
from llama2_server.engine.cuda.fused.attention_kernels import Attention
from llama2_server.engine.cuda.fused.forward import DEFAULT_TILE, FusedForward, FusedMatmul
from llama2_server.engine.cuda.fused.launch import launch_options
from llama2_server.engine.cuda.fused.sampling_kernels import FusedSampler
from llama2_server.engine.cuda.fused.step import FusedStep
from llama2_server.engine.cuda.matmul import VARIANTS, Matmul, MatmulVariant
from llama2_server.engine.cuda.matmul_kernels import TileConfig
from llama2_server.engine.cuda.step_runner import (
    COLUMNS,
    POSITION,
    REPETITION,
    SLOT,
    TEMPERATURE,
    TOP_P,
    UNIFORM,
    StepKernels,
    batch_sizes,
    sampling_state,
)
from llama2_server.engine.model.llama import LlamaModel

CONTEXTS = (1, 128, 512, 1024, 2500, 3071)  # tokens in the KV cache before the step
STEP_POSITION = 200
INTERPRETER_TILE = TileConfig(64, 64, 4)  # few programs, because the interpreter is slow
Found = list[dict[str, Any]]


def measure(model: LlamaModel) -> Iterator[tuple[str, Found]]:
    """Yield the seconds of the kernels, and the bytes per second of kernels that read weights, or keys and values."""
    kernels = _Kernels(model)
    with torch.inference_mode():
        yield "kernels, matmuls", list(kernels.matmuls())
        yield "kernels, matmuls of a step", list(kernels.matmuls_of_a_step())
        yield "kernels, attention", list(kernels.attention())
        steps = kernels.step_kinds()
        yield "kernels, sampling", list(kernels.sampling(steps))
        yield "kernels, steps", list(kernels.steps(steps))


class _Kernels:
    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._on_gpu = model.device.type == "cuda"
        self._epsilon = model.config.rms_norm_eps
        self._options = launch_options(model.device)
        self._workloads = dict(matmul_workloads(model))
        tile = DEFAULT_TILE if self._on_gpu else INTERPRETER_TILE
        self._tiles: dict[str, MatmulVariant] = dict.fromkeys(self._workloads, tile)
        self._variants = VARIANTS if self._on_gpu else (tile,)
        self._state = sampling_state(model)

    def _seconds(self, run: Callable[[], Any]) -> float:
        """Return the shortest of several rounds, each in a CUDA graph; on a CPU, of one."""
        if not self._on_gpu:
            started_at = time.perf_counter()
            run()
            return time.perf_counter() - started_at
        run()  # compile
        torch.cuda.synchronize()
        timer = graph_timer(run)
        return min(timer() for _ in range(ROUNDS))

    def matmuls(self) -> Iterator[dict[str, Any]]:
        """Measure each matmul of one row, with the weights of all layers and with each variant."""
        for name, workload in self._workloads.items():
            outputs, inputs = map(int, name.split()[-1].split("x"))
            calls = 1 if name.startswith("lm_head") else len(self._model.weights.layers)
            for variant in self._variants:
                kinds = {"plain": Matmul(self._epsilon, {name: variant})}
                if variant:
                    kinds["fused"] = FusedMatmul(self._epsilon, {name: variant}, self._options)
                for kind, matmul in kinds.items():
                    seconds = self._seconds(partial(workload, matmul)) / calls
                    yield {
                        "name": name,
                        "variant": str(variant or "torch"),
                        "kind": kind,
                        "seconds": seconds,
                        "bytes_per_second": outputs * inputs * self._model.dtype.itemsize / seconds,
                    }

    def matmuls_of_a_step(self) -> Iterator[dict[str, Any]]:
        """Measure all matmuls of a step one after another: plain, fused, and fused without overlap."""
        kinds = {
            "plain": Matmul(self._epsilon, self._tiles),
            "fused": FusedMatmul(self._epsilon, self._tiles, self._options),
            "fused without overlap": FusedMatmul(self._epsilon, self._tiles, {"PDL": False}),
        }
        for kind, matmul in kinds.items():
            yield {"kind": kind, "seconds": self._seconds(partial(self._chain, matmul))}

    def _chain(self, matmul: Matmul) -> None:
        weights = self._model.weights
        x = weights.embedding[:1]
        for layer in weights.layers:
            qkv = matmul.rmsnorm_linear(x, layer.attention_norm, layer.qkv)
            x = matmul.linear_residual(x, qkv[:, : self._model.config.query_size], layer.output)
            x = matmul.linear_residual(x, matmul.swiglu(x, layer.mlp_norm, layer.gate_up), layer.down)
        matmul.lm_head(x, weights.norm, weights.head)

    def attention(self) -> Iterator[dict[str, Any]]:
        """Measure the attention of all layers, by rows and tokens; the seconds are for one layer."""
        config, cache, device, dtype = (
            self._model.config, self._model.kv_cache, self._model.device, self._model.dtype
        )  # fmt: skip
        for rows in sorted({1, self._model.slots}):
            slots = torch.arange(rows, device=device)
            qkv = torch.randn(rows, config.query_size + 2 * config.kv_size, device=device).to(dtype)
            fused = Attention(rows, config.heads, cache.keys[0], self._options)
            for tokens in CONTEXTS if self._on_gpu else CONTEXTS[:1]:
                positions = torch.full((rows,), tokens, device=device)
                read = 2 * rows * tokens * config.kv_size * dtype.itemsize
                for kind, layers in (
                    ("plain", self._plain_attention),
                    ("fused", partial(self._fused_attention, fused)),
                ):
                    seconds = self._seconds(partial(layers, qkv, slots, positions)) / config.layers
                    rate = read / seconds
                    yield {"rows": rows, "context": tokens, "kind": kind, "seconds": seconds, "bytes_per_second": rate}

    def _plain_attention(self, qkv: Tensor, slots: Tensor, positions: Tensor) -> None:
        for keys, values in zip(self._model.kv_cache.keys, self._model.kv_cache.values, strict=True):
            rows = (slots, positions, keys, values)
            attention_kernels.attend(attention_kernels.rotate_and_store(qkv, self._model.rotary, *rows), *rows)

    def _fused_attention(self, attention: Attention, qkv: Tensor, slots: Tensor, positions: Tensor) -> None:
        cache = self._model.kv_cache
        for layer, keys, values in zip(self._model.weights.layers, cache.keys, cache.values, strict=True):
            attention(qkv, self._model.rotary, slots, positions, keys, values, layer.output)

    def step_kinds(self) -> dict[str, StepKernels]:
        """Return a plain and a fused step, each with the fastest tiles."""
        model, tiles = self._model, self._tiles
        if self._on_gpu:
            tiles = {name: fastest_variant(run, self._epsilon, name) for name, run in self._workloads.items()}
        sampler = FusedSampler(batch_sizes(model.slots)[-1], model.vocab_size, model.device, self._options)
        plain = StepKernels(CudaForward(model, Matmul(self._epsilon, tiles)))
        return {"plain": plain, "fused": FusedStep(FusedForward(model, tiles), sampler)}

    def _table(self, rows: int, *, sampled: bool) -> Tensor:  # (rows, COLUMNS)
        """Return the input of a step: greedy, or with the default parameters."""
        table = torch.zeros((rows, COLUMNS), dtype=torch.float64, device=self._model.device)
        table[:, SLOT] = torch.arange(rows)
        table[:, POSITION] = STEP_POSITION
        table[:, TEMPERATURE] = 0.6 if sampled else 0.0
        table[:, TOP_P], table[:, REPETITION], table[:, UNIFORM] = 0.9, 1.0, 0.4
        return table

    def sampling(self, steps: dict[str, StepKernels]) -> Iterator[dict[str, Any]]:
        """Measure the sampling of random logits, greedy and with the default parameters."""
        for rows in sorted({1, self._model.slots}):
            logits = torch.randn(rows, self._model.vocab_size, device=self._model.device)
            for kind, kernels in steps.items():
                for sampled in (False, True):
                    table = self._table(rows, sampled=sampled)
                    seconds = self._seconds(partial(kernels.sample, logits, table, self._state, not sampled))
                    yield {"rows": rows, "sampled": sampled, "kind": kind, "seconds": seconds}

    def steps(self, steps: dict[str, StepKernels]) -> Iterator[dict[str, Any]]:
        """Measure whole steps by the number of rows, greedy and with the default parameters; on a CPU, greedy only."""
        for rows in [size for size in batch_sizes(self._model.slots) if size <= self._model.slots]:
            for kind, kernels in steps.items():
                for sampled in (False, True) if self._on_gpu else (False,):
                    table = self._table(rows, sampled=sampled)
                    seconds = self._seconds(partial(self._step, kernels, table, sampled))
                    yield {"rows": rows, "sampled": sampled, "kind": kind, "seconds": seconds}

    def _step(self, kernels: StepKernels, table: Tensor, sampled: bool) -> None:
        kernels.sample(kernels.logits(table, self._state.last_ids), table, self._state, not sampled)
