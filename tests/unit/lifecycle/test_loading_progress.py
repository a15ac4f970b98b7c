"""The progress of model loading, in the log and on a terminal."""

import io
import logging

import pytest

from llama2_server.lifecycle.model_loading import LoadingProgress


def test_log_has_a_record_per_tenth(caplog: pytest.LogCaptureFixture) -> None:
    """Without a terminal, the log has ten records, not one per tensor, with numbers as fields."""
    with caplog.at_level(logging.INFO), LoadingProgress(on_terminal=False) as progress:
        for done in range(1, 1001):
            progress.show(done * 10**7, 10**10)
    percents = [vars(record)["percent"] for record in caplog.records]
    assert percents == list(range(10, 101, 10))
    assert caplog.messages[0] == "loading weights: 10% of 10.0 GB"
    assert vars(caplog.records[0])["bytes_loaded"] == 10**9


def test_terminal_has_a_progress_bar(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, a progress bar replaces the log records."""
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with caplog.at_level(logging.INFO), LoadingProgress(on_terminal=True) as progress:
        progress.show(10**9, 10**10)
    assert "loading weights:" in terminal.getvalue()
    assert not caplog.messages
