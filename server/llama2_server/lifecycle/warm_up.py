"""Generate before the first request, and compare the speed of this machine with the operator's timeouts."""

import asyncio
import logging
from dataclasses import dataclass

from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.lifecycle.model_loading import LoadedModel
from llama2_server.lifecycle.probe import probe
from llama2_server.lifecycle.tasks import StartupCancelled, cancel_on
from llama2_server.telemetry.startup_log import STARTUP_LOG

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per token, as measured in the warm-up."""

    prefill_seconds: float
    decode_seconds: float

    def expected_hold_seconds(self, card: ModelCard) -> float:
        """Return how long a reply holds its slot if it has half of the default `max_tokens`."""
        return self.decode_seconds * card.default_max_tokens / 2


async def warm_up(engine: SupervisedEngine, loaded: LoadedModel, settings: Settings, card: ModelCard) -> Speed:
    """Generate twice, so that the first request does not pay for one-time initialization; warn of short timeouts.

    Returns the speed of this machine.

    Raises:
        ConfigurationError: the model cannot generate.
    """
    for _ in range(2):  # the first generation initializes kernels and caches: its time is not representative
        generation = await probe(engine, loaded.tokenizer, max_tokens=2)
        if generation.failed:
            raise ConfigurationError("the model cannot generate; the log above has the reason")
    speed = Speed(
        prefill_seconds=(generation.first_token_at - generation.admitted_at) / generation.tokens.input_tokens,
        decode_seconds=generation.finished_at - generation.first_token_at,
    )
    warn_if_timeouts_too_short(settings, card, speed, loaded.model.prefill_chunk_tokens)
    return speed


async def warm_up_unless_cancelled(
    engine: SupervisedEngine,
    loaded: LoadedModel,
    settings: Settings,
    card: ModelCard,
    exit_code: "asyncio.Future[int]",
) -> Speed:
    """Warm up, the last step of the start; if `exit_code` is set first, close the engine.

    Raises:
        ConfigurationError: the model cannot generate.
        StartupCancelled: `exit_code` was set first.
    """
    STARTUP_LOG.step("warming up")
    try:
        return await cancel_on(exit_code, warm_up(engine, loaded, settings, card))
    except StartupCancelled:
        await engine.close(0)  # no client waits for the step in progress
        raise
    finally:
        STARTUP_LOG.finish()


def warn_if_timeouts_too_short(settings: Settings, card: ModelCard, speed: Speed, prefill_chunk_tokens: int) -> None:
    """Log a warning for each timeout that would end work which is merely slow."""
    longest_call_seconds = (
        settings.queue_timeout_seconds
        + speed.prefill_seconds * card.context_length_limit
        + speed.decode_seconds * card.sequence_length_limit
    )
    if longest_call_seconds > settings.max_connection_age_grace_seconds:
        logger.warning(
            "--max-connection-age-grace-seconds: the longest generation, its queue time included, may take %.0f s on "
            "this machine, and connections close after %.0f s of grace: raise it",
            longest_call_seconds,
            settings.max_connection_age_grace_seconds,
        )
    chunk_tokens = min(prefill_chunk_tokens, card.context_length_limit)
    step_seconds = max(speed.prefill_seconds * chunk_tokens, speed.decode_seconds)
    if 2 * step_seconds > settings.engine_step_timeout_seconds:
        logger.warning(
            "--engine-step-timeout-seconds: a step may take %.0f s on this machine, and the engine counts as hung "
            "after %.0f s: raise it",
            step_seconds,
            settings.engine_step_timeout_seconds,
        )
