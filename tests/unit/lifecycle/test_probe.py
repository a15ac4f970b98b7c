"""The server's own generations, on a scripted model."""

from tests.support.scripted_model import ScriptedModel

from llama2_server.admission.accounts import Account
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.lifecycle import probe


async def test_probes_own_no_prefix(demo_tokenizer: Tokenizer) -> None:
    """Each computes its whole prompt, or its time would tell nothing; no account of any name goes on from it."""
    prompt_ids = demo_tokenizer.encode_chat(probe.PROMPT)
    model = ScriptedModel([300], vocab_size=demo_tokenizer.vocab_size, probe_ids=prompt_ids, chunk_invariant=True)
    engine = Engine(model, frozenset())
    try:
        watched = SupervisedEngine(engine, engine_step_timeout_seconds=60)
        probes = [await probe.probe(watched, demo_tokenizer, max_tokens=2) for _ in range(2)]
        assert [one.reused_input_tokens for one in probes] == [0, 0]
        assert model.probes == 2
        callers = Generation(
            Prompt(tuple(prompt_ids), raw=False), GenerationParams(max_tokens=2), demo_tokenizer, lambda counts: None
        )
        callers.start(RequestQueue(1, max_queue_size=0, queue_timeout_seconds=1), watched, Account("probe"), None)
        await callers.wait()
        assert callers.reused_input_tokens == 0
        assert model.probes == 3
    finally:
        assert engine.close(timeout_seconds=10)
