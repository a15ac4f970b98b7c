"""From the settings to a model on its device, and what is shown on the way."""

import logging
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from tqdm import tqdm

from llama2_server.admission.accounts import Authenticator
from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.checkpoint.config_cache import read_metadata
from llama2_server.engine.checkpoint.loader import fetch_checkpoint, load_model
from llama2_server.engine.cuda.build import build_step_runner
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.interface import Model
from llama2_server.engine.step_runner import StepRunner
from llama2_server.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_SECONDS = 5.0
PROGRESS_INTERVAL_PERCENT = 10


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What has to be there before the port opens."""

    card: ModelCard
    accounts: Authenticator
    tokenizer: Tokenizer
    model: Model
    eos_ids: frozenset[int]
    fingerprint: str
    """Tells the weights from others."""
    step_runner: StepRunner | None = None
    """How the model's steps are computed, where it is not the engine's own way."""


def load(settings: Settings, card: ModelCard, accounts: Authenticator) -> LoadedModel:
    """Load the weights onto the device; takes up to minutes, and may be called on any thread.

    Raises:
        ConfigurationError: with one line for the operator.
    """
    try:
        return _load(settings, card, accounts)
    except WeightsError as error:
        raise ConfigurationError(f"--weights: {error}") from error


def _load(settings: Settings, card: ModelCard, accounts: Authenticator) -> LoadedModel:
    begun = time.monotonic()
    checkpoint = _demo_checkpoint() if settings.weights is None else fetch_checkpoint(settings.weights)
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    metadata = read_metadata(checkpoint, settings.data_directory / "checkpoint.json")
    with LoadingProgress(on_terminal=sys.stderr.isatty()) as progress:
        model = load_model(
            checkpoint,
            device=_device(settings),
            dtype=getattr(torch, settings.dtype or card.generation_config.dtype),
            context_length=card.context_length_limit,
            slots=card.max_concurrent_requests,
            config=metadata.config,
            progress=progress.show,
            cpu_kernels=settings.cpu_kernels,
        )
    logger.info("loaded %s on %s as %s in %.1f s", card.name, model.device, model.dtype, time.monotonic() - begun)
    step_runner = build_step_runner(
        model, compiled=settings.gpu_kernels == "auto", cache_directory=settings.data_directory / "cuda"
    )
    return LoadedModel(card, accounts, tokenizer, model, metadata.eos_ids, model.weights.fingerprint(), step_runner)


class LoadingProgress:
    """How far the weights are: a bar on a terminal; elsewhere a log line every tenth, or every five seconds."""

    def __init__(self, *, on_terminal: bool) -> None:
        self._bar = tqdm(desc="loading weights", unit="B", unit_scale=True, leave=False, disable=not on_terminal)
        self._on_terminal = on_terminal
        self._said_percent = 0
        self._said_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, done: int, total: int) -> None:
        """So many of the bytes are on the device."""
        if self._on_terminal:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        percent = 100 * done // max(total, 1)
        now = time.monotonic()
        if percent < self._said_percent + PROGRESS_INTERVAL_PERCENT and now < self._said_at + PROGRESS_INTERVAL_SECONDS:
            return
        self._said_percent, self._said_at = percent - percent % PROGRESS_INTERVAL_PERCENT, now
        figures = {"percent": percent, "bytes_loaded": done, "bytes_total": total}
        logger.info("loading weights: %d%% of %.1f GB", percent, total / 1e9, extra=figures)


def _device(settings: Settings) -> str:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "--device: cuda was requested and torch finds no CUDA device; use --device cpu, or install CUDA torch"
        )
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _demo_checkpoint() -> Path:
    return Path(str(resources.files("llama2_server") / "demo"))
