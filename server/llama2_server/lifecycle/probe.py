"""A short generation that the server starts itself, to warm up a new server and to test an idle one."""

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.supervised_engine import SupervisedEngine

PROMPT = (ChatMessage("user", "Hello"),)


async def probe(engine: SupervisedEngine, tokenizer: Tokenizer, *, max_tokens: int = 1) -> Generation:
    """Generate without account, quota or usage record; return the generation when it has ended.

    The probe has a dedicated queue. In the clients' queue it would reject a client of a server with
    `--max-queue-size 0`, and its short hold would distort the estimated waits. Without an account, each probe computes
    its whole prompt.
    """
    prompt = Prompt(tuple(tokenizer.encode_chat(PROMPT)), raw=False)
    generation = Generation(prompt, GenerationParams(max_tokens=max_tokens), tokenizer, lambda tokens: None)
    queue = RequestQueue(1, max_queue_size=0, queue_timeout_seconds=1)
    generation.start(queue, queue.enter("", None), engine, None, None)
    try:
        await generation.wait()
    finally:
        generation.cancel()
    return generation


async def probe_succeeds(engine: SupervisedEngine, tokenizer: Tokenizer) -> bool:
    """Run one probe, and return whether it generated a token."""
    return not (await probe(engine, tokenizer)).failed
