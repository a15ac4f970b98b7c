"""A server process whose loading or model hangs: `python -m tests.support.scripted_process SCRIPT FLAGS`."""

import functools
import itertools
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

from tests.support.scripted_model import ScriptedModel

from llama2_server import app
from llama2_server.card import ModelCard
from llama2_server.cli.main import main
from llama2_server.config.settings import Settings
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.generation import supervised_engine
from llama2_server.lifecycle.model_loading import LoadedModel, load_model

ENDLESS_ID = 300  # any token but the end of a sequence
HANGS_AFTER_STEPS = 8
BLOCKS_AFTER_STEPS = 64
WARM_UP_GENERATIONS = 2


def load_forever(settings: Settings, card: ModelCard) -> LoadedModel:
    """Never finish loading the weights."""
    threading.Event().wait()
    raise AssertionError


def announce_and_load_forever(settings: Settings, card: ModelCard) -> LoadedModel:
    """Print a line, and never finish loading the weights."""
    print("loading", flush=True)
    return load_forever(settings, card)


def load_hanging_model(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model that hangs in one of its steps, some time after the warm-up; then the step times out immediately."""
    loaded = load_model(settings, card)
    model = ScriptedModel([ENDLESS_ID], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()
    model.allow(HANGS_AFTER_STEPS)

    def monotonic() -> float:
        hangs = model.completed_steps == HANGS_AFTER_STEPS and model.in_step.is_set()
        return time.monotonic() + (settings.engine_step_timeout_seconds if hangs else 0)

    supervised_engine.time = SimpleNamespace(monotonic=monotonic)  # type: ignore[attr-defined, assignment]
    return LoadedModel(loaded.tokenizer, model, loaded.eos_ids, loaded.fingerprint)


def load_blocked_model(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model that generates a number of tokens after the warm-up, and then blocks without a timeout."""
    loaded = load_model(settings, card)
    model = ScriptedModel([ENDLESS_ID], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()
    model.allow(BLOCKS_AFTER_STEPS)
    return LoadedModel(loaded.tokenizer, model, loaded.eos_ids, loaded.fingerprint)


def load_slow_model(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model that needs a tenth of a second per step after the warm-up."""
    loaded = load_model(settings, card)
    model = ScriptedModel([ENDLESS_ID], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()
    model.allow(HANGS_AFTER_STEPS)

    def allow_steps() -> None:
        while True:
            time.sleep(0.1)
            model.allow(1)

    threading.Thread(target=allow_steps, daemon=True).start()
    return LoadedModel(loaded.tokenizer, model, loaded.eos_ids, loaded.fingerprint)


def load_model_that_hangs_in_the_warm_up(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model that hangs in its first step, and print a line when it is in that step."""
    loaded = load_model(settings, card)
    model = ScriptedModel([ENDLESS_ID], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()

    def print_when_in_step() -> None:
        model.in_step.wait()
        print("in the first step", flush=True)

    threading.Thread(target=print_when_in_step, daemon=True).start()
    return LoadedModel(loaded.tokenizer, model, loaded.eos_ids, loaded.fingerprint)


def load_model_whose_device_dies(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model whose steps all fail after some time, as after an illegal address in a CUDA kernel."""
    loaded = load_model(settings, card)
    model = ScriptedModel([ENDLESS_ID], vocab_size=loaded.tokenizer.vocab_size)
    model.gate()
    model.allow(HANGS_AFTER_STEPS)

    def fail_when_out_of_steps() -> None:
        while model.completed_steps < HANGS_AFTER_STEPS:
            model.in_step.wait()
        model.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
        model.open_gate()

    threading.Thread(target=fail_when_out_of_steps, daemon=True).start()
    return LoadedModel(loaded.tokenizer, model, loaded.eos_ids, loaded.fingerprint)


def load_model_that_loses_its_slot(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model whose KV cache slot cannot be released, after the warm-up."""
    loaded = load_model(settings, card)
    model = ScriptedModel([ENDLESS_ID], vocab_size=loaded.tokenizer.vocab_size)
    release, releases = PrefixCache.release, itertools.count()

    def release_until_the_warm_up_has_ended(*args: Any) -> None:
        if next(releases) >= WARM_UP_GENERATIONS:
            raise RuntimeError("injected")
        release(*args)

    PrefixCache.release = release_until_the_warm_up_has_ended  # type: ignore[method-assign, assignment]
    return LoadedModel(loaded.tokenizer, model, loaded.eos_ids, loaded.fingerprint)


if __name__ == "__main__":
    scripts = {
        "never-loads": load_forever,
        "announces-and-never-loads": announce_and_load_forever,
        "hangs": load_hanging_model,
        "blocks": load_blocked_model,
        "slow": load_slow_model,
        "hangs-in-the-warm-up": load_model_that_hangs_in_the_warm_up,
        "device-dies": load_model_whose_device_dies,
        "loses-its-slot": load_model_that_loses_its_slot,
    }
    app.serve = functools.partial(app.serve, load=scripts[sys.argv.pop(1)])
    main()
