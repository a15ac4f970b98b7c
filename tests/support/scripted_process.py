"""A server process whose model loading or model misbehaves: `python -m tests.support.scripted_process HOW FLAGS`."""

import functools
import sys
import threading

from tests.support.scripted_model import ScriptedModel

from llama2_server import app
from llama2_server.admission.accounts import Authenticator
from llama2_server.card import ModelCard
from llama2_server.cli.main import main
from llama2_server.config.settings import Settings
from llama2_server.lifecycle.model_loading import LoadedModel, load

HANGS_AFTER_STEPS = 8


def never_loads(settings: Settings, card: ModelCard, accounts: Authenticator) -> LoadedModel:
    """Weights that never come."""
    threading.Event().wait()
    raise AssertionError


def hangs(settings: Settings, card: ModelCard, accounts: Authenticator) -> LoadedModel:
    """A model that does not come back from one of its steps, some time after the warm-up."""
    loaded = load(settings, card, accounts)
    model = ScriptedModel([300], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()
    model.allow(HANGS_AFTER_STEPS)
    return LoadedModel(card, accounts, loaded.tokenizer, model, loaded.eos_ids, "scripted")


def hangs_in_the_warm_up(settings: Settings, card: ModelCard, accounts: Authenticator) -> LoadedModel:
    """A model that does not come back from its first step, and says when it is in it."""
    loaded = load(settings, card, accounts)
    model = ScriptedModel([300], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()

    def tell() -> None:
        model.in_step.wait()
        print("in the first step", flush=True)

    threading.Thread(target=tell, daemon=True).start()
    return LoadedModel(card, accounts, loaded.tokenizer, model, loaded.eos_ids, "scripted")


if __name__ == "__main__":
    ways = {"never-loads": never_loads, "hangs": hangs, "hangs-in-the-warm-up": hangs_in_the_warm_up}
    how = ways[sys.argv.pop(1)]
    app.serve = functools.partial(app.serve, load=how)
    main()
