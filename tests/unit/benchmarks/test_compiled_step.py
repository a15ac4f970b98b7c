"""The peer of `make bench-gpu` that decodes with a compiled step."""

import pytest
import torch
from benchmarks.gpu.measurement.compiled_step import CompiledStep
from benchmarks.gpu.models import SHAPES, random_weights

from llama2_server.engine.model.llama import LlamaModel


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_its_logits_are_those_of_the_model(kv_heads: int) -> None:
    """After a prompt and after each token, in float32."""
    from dataclasses import replace

    config = replace(SHAPES["tiny"], kv_heads=kv_heads)
    weights = random_weights(config, "cpu", torch.float32)
    model = LlamaModel(config, weights, context_length=64, slots=1, cpu_kernels="torch")
    peer = CompiledStep(model, context_length=32)
    prompt = [5, 9, 200, 17]
    with torch.no_grad():
        found = peer.transformer(torch.tensor([prompt]), torch.arange(4))[0, -1]
        torch.testing.assert_close(found, model.prefill(0, prompt, 0))
        for position, token in enumerate([7, 300, 41], 4):
            found = peer.transformer(torch.tensor([[token]]), torch.tensor([position]))[0, -1]
            torch.testing.assert_close(found, model.decode([0], [token], [position])[0])


def test_it_decodes_with_one_compiled_graph() -> None:
    """The traced step gives the tokens of the plain one. Its inputs keep their shapes, so that it is traced once."""
    torch._dynamo.reset()
    model = LlamaModel(SHAPES["tiny"], random_weights(SHAPES["tiny"], "cpu"), context_length=64, slots=1)
    peer, plain = (CompiledStep(model, context_length=32) for _ in range(2))
    plain._step = plain._next_token
    assert peer.generate([5, 9, 200, 17], 12) == plain.generate([5, 9, 200, 17], 12)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert peer.generate([5, 9, 200], 12) == plain.generate([5, 9, 200], 12)
    torch._dynamo.reset()
