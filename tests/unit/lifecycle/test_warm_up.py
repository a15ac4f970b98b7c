"""Warnings about timeouts that are too short for the measured speed."""

import pytest

from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.lifecycle.warm_up import Speed, warn_if_timeouts_too_short


def test_short_timeouts_are_logged(demo_card: ModelCard, caplog: pytest.LogCaptureFixture) -> None:
    """The log warns if the longest generation outlasts a connection's grace, or a step the engine's timeout."""
    settings = Settings.model_validate({})
    warn_if_timeouts_too_short(settings, demo_card, Speed(prefill_seconds=0.001, decode_seconds=0.01), 512)
    assert not caplog.messages
    warn_if_timeouts_too_short(settings, demo_card, Speed(prefill_seconds=0.2, decode_seconds=10.0), 512)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "--max-connection-age-grace-seconds",
        "--engine-step-timeout-seconds",
    ]


def test_expected_duration_is_that_of_half_the_default_tokens(demo_card: ModelCard) -> None:
    """The queue expects it until it has measured one."""
    speed = Speed(prefill_seconds=0.001, decode_seconds=0.5)
    assert speed.expected_hold_seconds(demo_card) == demo_card.default_max_tokens / 4
