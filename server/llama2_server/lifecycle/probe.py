"""A short generation of our own, charged to nobody: it warms up a new server and proves that an idle one works."""

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.supervised_engine import SupervisedEngine

PROMPT = (ChatMessage("user", "Hello"),)


async def probe(engine: SupervisedEngine, tokenizer: Tokenizer, *, max_tokens: int = 1) -> Generation:
    """Generate by the path of every caller, and return when the generation has ended, in whatever way.

    It has a slot of its own: one of the callers' would turn away who comes meanwhile to a server without a line, and
    its short stay would spoil the estimates of their waits. It has no account: each probe computes its whole prompt.
    """
    prompt = Prompt(tuple(tokenizer.encode_chat(PROMPT)), raw=False)
    generation = Generation(prompt, GenerationParams(max_tokens=max_tokens), tokenizer, lambda counts: None)
    generation.start(RequestQueue(1, max_queue_size=0, queue_timeout_seconds=1), engine, None, None)
    try:
        await generation.ended()
    finally:
        generation.leave()
    return generation
