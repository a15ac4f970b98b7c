"""A server process whose model blocks after the first tokens of its reply, and whose leases do not expire."""

import functools

from tests.support.scripted_model import ScriptedModel, scripted_fingerprint

from llama2_server import app
from llama2_server.card import ModelCard
from llama2_server.cli.main import main
from llama2_server.config.settings import Settings
from llama2_server.generation.replicas import leases
from llama2_server.lifecycle import probe
from llama2_server.lifecycle.model_loading import LoadedModel, load_model

REPLY = "Once upon a time, a fox 🦊 lived by the sea."
TOKENS = 8


def load_model_that_stops_in_its_reply(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model that blocks after the first tokens of `REPLY`, but not in probes."""
    loaded = load_model(settings, card)
    tokenizer = loaded.tokenizer
    reply_ids, probe_ids = tokenizer.encode_raw(REPLY)[1:], tokenizer.encode_chat(probe.PROMPT)
    model = ScriptedModel(reply_ids, vocab_size=tokenizer.vocab_size, probe_ids=probe_ids)
    model.gate()
    model.allow(TOKENS)
    return LoadedModel(tokenizer, model, loaded.eos_ids, scripted_fingerprint("scripted"))


if __name__ == "__main__":
    leases.LEASE_SECONDS = 120.0
    leases.STORE_TIMEOUT_SECONDS = 30.0
    app.serve = functools.partial(app.serve, load=load_model_that_stops_in_its_reply)
    main()
