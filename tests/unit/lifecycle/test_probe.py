"""The probe, on a scripted model."""

from tests.support.scripted_model import ScriptedModel

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.lifecycle import probe


async def test_probe_neither_uses_nor_fills_the_prefix_cache(demo_tokenizer: Tokenizer) -> None:
    """Each probe computes its whole prompt, so that its time is meaningful; no account reuses a probe's tokens."""
    prompt_ids = demo_tokenizer.encode_chat(probe.PROMPT)
    model = ScriptedModel([300], vocab_size=demo_tokenizer.vocab_size, probe_ids=prompt_ids, chunk_invariant=True)
    engine = Engine(model, frozenset())
    try:
        supervised = SupervisedEngine(engine, engine_step_timeout_seconds=60)
        probes = [await probe.probe(supervised, demo_tokenizer, max_tokens=2) for _ in range(2)]
        assert [generation.reused_input_tokens for generation in probes] == [0, 0]
        assert model.probes == 2
        prompt, params = Prompt(tuple(prompt_ids), raw=False), GenerationParams(max_tokens=2)
        of_client = Generation(prompt, params, demo_tokenizer, lambda tokens: None)
        queue = RequestQueue(1, max_queue_size=0, queue_timeout_seconds=1)
        of_client.start(queue, queue.enter("probe", None), supervised, "probe", None)
        await of_client.wait()
        assert of_client.reused_input_tokens == 0
        assert model.probes == 3
    finally:
        assert engine.close(timeout_seconds=10)
