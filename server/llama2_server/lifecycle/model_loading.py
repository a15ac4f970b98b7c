"""Load the model onto its device, and report the progress."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch
from tqdm import tqdm

from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.checkpoint.chat_template import check_chat_template
from llama2_server.engine.checkpoint.config_cache import ModelMetadata, read_explicit_metadata, read_metadata
from llama2_server.engine.checkpoint.formats import check_format
from llama2_server.engine.checkpoint.hub.download import fetch_checkpoint, find_checkpoint
from llama2_server.engine.checkpoint.layout import read_headers
from llama2_server.engine.checkpoint.loader import load_model as load_weights
from llama2_server.engine.checkpoint.tokenizer_files import open_tokenizer
from llama2_server.engine.cuda.build import build_step_runner
from llama2_server.engine.cuda.driver import has_nvidia_device, unusable_reason
from llama2_server.engine.engine import Engine
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.fingerprint.execution import checkpoint_inputs, depends_on_neighbors, execution_inputs
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.fingerprint.weights import WeightFiles, add_weights
from llama2_server.engine.model.interface import Model
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_planner import StepPolicy
from llama2_server.engine.step_runner import StepRunner
from llama2_server.engine.steps.report import StepReport
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.lifecycle.checks.checkpoint import demo_checkpoint, uses_demo_weights, weights_problem
from llama2_server.lifecycle.tasks import cancel_on, run_in_thread
from llama2_server.telemetry.startup_log import STARTUP_LOG

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_SECONDS = 5.0
PROGRESS_INTERVAL_PERCENT = 10
CUDA_REMEDY = "install a CUDA build of torch and a driver that fits it, or use --device cpu"
# Smaller weights load within a second.
MIN_PROGRESS_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model on its device, with its tokenizer."""

    tokenizer: Tokenizer
    model: Model
    eos_ids: frozenset[int]
    fingerprint: Fingerprint
    """Names everything that decides the text of a reply."""
    step_runner: StepRunner | None = None
    """Runs the model's steps; None for the engine's default."""
    step_policy: StepPolicy = field(default_factory=StepPolicy)
    """How combined steps divide their rows."""

    def engine(self, on_step: Callable[[StepReport], None]) -> Engine:
        """Return a new engine, which owns the model from now on."""
        return Engine(
            self.model, self.eos_ids, on_step=on_step, step_runner=self.step_runner, step_policy=self.step_policy
        )


Load = Callable[[Settings, ModelCard], LoadedModel]


def load_model(settings: Settings, card: ModelCard) -> LoadedModel:
    """Load the model that the settings name. Takes up to minutes; can be called on any thread.

    Raises:
        ConfigurationError: the checkpoint or the device cannot be used.
    """
    try:
        return _load(settings, card)
    except (WeightsError, OSError) as error:
        raise weights_problem(error) from error


def _load(settings: Settings, card: ModelCard) -> LoadedModel:
    started_at = time.monotonic()
    checkpoint = _checkpoint(settings)
    check_format(checkpoint)
    tokenizer = open_tokenizer(checkpoint)
    check_chat_template(checkpoint, tokenizer, allow_other=settings.allow_other_chat_template)
    metadata = _metadata(checkpoint, settings)
    config = metadata.config
    if settings.max_position_embeddings is not None:
        config = replace(config, max_positions=settings.max_position_embeddings)
    if uses_demo_weights(settings):  # any card can try the service with it; its stories are shorter than its context
        config = replace(config, max_positions=max(config.max_positions, card.context_length_limit))
    files = WeightFiles(entry.path for entry in read_headers(checkpoint).values())
    with LoadingProgress(on_terminal=sys.stderr.isatty()) as progress:
        model = load_weights(
            checkpoint,
            device=_device(settings.device),
            dtype=getattr(torch, settings.dtype or card.generation_config.dtype),
            context_length=card.context_length_limit,
            slots=card.max_concurrent_requests,
            config=config,
            tokenizer=tokenizer,
            progress=progress.show,
            cpu_kernels=settings.cpu_kernels,
            cpu_weight_bits=settings.cpu_weight_bits,
            threads=settings.threads,
        )
    seconds = time.monotonic() - started_at
    step_runner = build_step_runner(
        model, kernels=settings.gpu_kernels, cache_directory=settings.data_directory / "cuda"
    )
    name = f"{card.name}, weights {settings.weights or 'demo'}"
    kind = f"{step_runner.kind}, kernels: {model.kernels}" if model.kernels else step_runner.kind
    logger.info("loaded %s on %s as %s in %.1f s; step: %s", name, model.device, model.dtype, seconds, kind)
    inputs = {"card": card.text_digest} | checkpoint_inputs(checkpoint, metadata, tokenizer)
    fingerprint = _fingerprint(inputs, model, step_runner)
    add_weights(fingerprint, files, settings.data_directory / "weights.json", model.weights.quick_digest())
    step_policy = StepPolicy(settings.prompt_lookup, settings.max_mixed_step_seconds)
    return LoadedModel(tokenizer, model, metadata.eos_ids, fingerprint, step_runner, step_policy)


def _metadata(checkpoint: Path, settings: Settings) -> ModelMetadata:
    if uses_demo_weights(settings):
        return read_explicit_metadata(checkpoint)
    return read_metadata(checkpoint, settings.data_directory / "checkpoint.json")


def _checkpoint(settings: Settings) -> Path:
    if uses_demo_weights(settings):
        return demo_checkpoint()
    weights = settings.weights or ""
    directory = find_checkpoint(weights)
    if directory is None:
        STARTUP_LOG.step(f"downloading {weights}")
        directory = fetch_checkpoint(weights)
        STARTUP_LOG.step("loading the model")
    return directory


def _fingerprint(inputs: dict[str, str], model: LlamaModel, step_runner: StepRunner) -> Fingerprint:
    """Return the fingerprint without the digest of the weights."""
    inputs = inputs | execution_inputs(model, step_runner)
    quick_digest = model.weights.quick_digest()
    return Fingerprint(inputs, quick_digest, depends_on_neighbors=depends_on_neighbors(model))


async def load_in_thread(
    load: Load, settings: Settings, card: ModelCard, exit_code: "asyncio.Future[int]"
) -> LoadedModel:
    """Run a load function on a thread.

    Raises:
        ConfigurationError: the model cannot be loaded.
        StartupCancelled: `exit_code` was set first; the thread continues until the process exits.
    """
    STARTUP_LOG.step("loading the model")
    return await cancel_on(exit_code, run_in_thread("loading", lambda: load(settings, card)))


class LoadingProgress:
    """Report the progress of loading: a bar on a terminal; otherwise a log record every 10% or every 5 seconds.

    Weights of at most MIN_PROGRESS_BYTES are not reported.
    """

    def __init__(self, *, on_terminal: bool) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._on_terminal = on_terminal
        self._logged_percent = 0
        self._logged_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Report that `done` of `total` bytes are on the device."""
        if total <= MIN_PROGRESS_BYTES:
            return
        if self._on_terminal:
            if self._bar is None:
                self._bar = tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, leave=False)
            self._bar.update(done - self._bar.n)
            STARTUP_LOG.touch()
            return
        percent = 100 * done // max(total, 1)
        now = time.monotonic()
        if (
            percent < self._logged_percent + PROGRESS_INTERVAL_PERCENT
            and now < self._logged_at + PROGRESS_INTERVAL_SECONDS
        ):
            return
        self._logged_percent, self._logged_at = percent - percent % PROGRESS_INTERVAL_PERCENT, now
        fields = {"percent": percent, "bytes_loaded": done, "bytes_total": total}
        logger.info("loading weights: %d%% of %.1f GB", percent, total / 1e9, extra=fields)


def _device(device: str) -> str:
    if device == "cpu":
        return device
    reason = unusable_reason()
    if reason is None:
        return "cuda"
    if device == "cuda":
        raise ConfigurationError(f"--device: cuda was requested, but torch cannot use it: {reason}; {CUDA_REMEDY}")
    if has_nvidia_device():
        logger.warning("running on the CPU, although this machine has an NVIDIA device: %s; %s", reason, CUDA_REMEDY)
    return "cpu"
