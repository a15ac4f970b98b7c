"""What the speed of this machine means for the time limits that the operator has set."""

import logging

from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings

logger = logging.getLogger(__name__)


def warn_if_timeouts_too_short(
    settings: Settings, card: ModelCard, *, prefill_seconds: float, decode_seconds: float, chunk_tokens: int
) -> None:
    """Warn of limits that would end work which only takes long; the seconds are for one token, as just measured."""
    longest = (
        settings.queue_timeout_seconds
        + prefill_seconds * card.context_length_limit
        + decode_seconds * card.sequence_length_limit
    )
    if longest > settings.max_connection_age_grace_seconds:
        logger.warning(
            "max_connection_age_grace_seconds: the longest generation, with its wait, may take %.0f s here, and "
            "connections are closed after %.0f s of grace: raise it",
            longest,
            settings.max_connection_age_grace_seconds,
        )
    step = max(prefill_seconds * min(chunk_tokens, card.context_length_limit), decode_seconds)
    if 2 * step > settings.engine_step_timeout_seconds:
        logger.warning(
            "engine_step_timeout_seconds: a step may take %.0f s here, and the engine counts as hung after %.0f s: "
            "raise it",
            step,
            settings.engine_step_timeout_seconds,
        )
