"""The whole server process around a model of random weights: `python -m benchmarks.gpu.server SHAPE DEVICE FLAGS`."""

import functools
import sys
import tempfile
from pathlib import Path

from tools.make_checkpoint import make_tokenizer

from benchmarks.gpu.models import SHAPES, random_model
from llama2_server import app
from llama2_server.__main__ import main
from llama2_server.accounts import Accounts
from llama2_server.card import ModelCard
from llama2_server.engine.cuda.building import steps_for
from llama2_server.engine.tokenizer import Tokenizer
from llama2_server.loading import Loaded
from llama2_server.settings import Settings


def random_load(shape: str, device: str, settings: Settings, card: ModelCard, accounts: Accounts) -> Loaded:
    """What `loading.load` does, without a checkpoint; no token ends a reply."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        make_tokenizer(path, SHAPES[shape].vocab_size)
        tokenizer = Tokenizer(path)
    model = random_model(shape, device, slots=card.max_concurrent_requests, context_length=card.context_length_limit)
    steps = steps_for(model, compiled=settings.compile, cache_directory=settings.data_directory / "cuda")
    return Loaded(card, accounts, tokenizer, model, frozenset(), "random", steps)


if __name__ == "__main__":
    load = functools.partial(random_load, sys.argv.pop(1), sys.argv.pop(1))
    app.serve = functools.partial(app.serve, load=load)
    main()
