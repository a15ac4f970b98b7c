"""The complete server process with random weights.

Run it with `python -m benchmarks.gpu.measurement.server SHAPE DEVICE FLAGS`.
"""

import functools
import sys
import tempfile
import threading
import time
from pathlib import Path

from tools.make_checkpoint import make_tokenizer

from benchmarks.gpu.measurement.ceilings import synchronize
from benchmarks.gpu.measurement.service import ENGINE_THREAD, LOAD_SECONDS
from benchmarks.gpu.models import SHAPES, random_model
from llama2_server import app
from llama2_server.card import ModelCard
from llama2_server.cli.main import main
from llama2_server.config.settings import Settings
from llama2_server.engine.cuda.build import build_step_runner
from llama2_server.engine.fingerprint.execution import execution_inputs
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.lifecycle.model_loading import LoadedModel

POLL_SECONDS = 0.02


def random_load(shape: str, device: str, settings: Settings, card: ModelCard) -> LoadedModel:
    """Load a model with random weights, in place of `model_loading.load_model`; no token ends a reply."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        make_tokenizer(path, SHAPES[shape].vocab_size)
        tokenizer = Tokenizer(path)
    started_at = time.perf_counter()
    model = random_model(shape, device, slots=card.max_concurrent_requests, context_length=card.context_length_limit)
    synchronize(device)
    directory = settings.data_directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LOAD_SECONDS).write_text(str(time.perf_counter() - started_at), encoding="ascii")
    step_runner = build_step_runner(model, kernels=settings.gpu_kernels, cache_directory=directory / "cuda")
    (directory / ENGINE_THREAD).unlink(missing_ok=True)  # of an earlier start
    threading.Thread(target=write_engine_thread, args=(directory / ENGINE_THREAD,), daemon=True).start()
    fingerprint = Fingerprint(execution_inputs(model, step_runner), "random")
    return LoadedModel(tokenizer, model, frozenset(), fingerprint, step_runner)


def write_engine_thread(path: Path) -> None:
    """Wait until the engine has started, and write Linux's number of its thread."""
    while not (found := [thread for thread in threading.enumerate() if thread.name == "engine" and thread.native_id]):
        time.sleep(POLL_SECONDS)
    path.write_text(str(found[0].native_id), encoding="ascii")


if __name__ == "__main__":
    load = functools.partial(random_load, sys.argv.pop(1), sys.argv.pop(1))
    app.serve = functools.partial(app.serve, load=load)
    main()
