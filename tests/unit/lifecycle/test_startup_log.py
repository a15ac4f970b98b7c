"""The log records of a long start."""

import logging
import threading

import pytest

from llama2_server.telemetry.startup_log import StartupLog


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.time


def test_a_silent_step_is_logged_with_its_time(caplog: pytest.LogCaptureFixture) -> None:
    """After four seconds without another log record or a progress bar, the log has the step and its duration."""
    clock = Clock()
    startup = StartupLog(4.0, clock)
    with caplog.at_level(logging.INFO):
        startup.step("importing torch")
        clock.time += 3
        assert startup.report() == 1
        assert caplog.messages == []
        clock.time += 1
        assert startup.report() == 4
        assert caplog.messages == ["still importing torch, 4 s"]
        clock.time += 3
        startup.emit(logging.makeLogRecord({}))
        startup.step("loading the model")
        clock.time += 2
        assert startup.report() == 2
        startup.touch()
        clock.time += 4.5
        startup.report()
        assert caplog.messages[1:] == ["still loading the model, 6 s"]


def test_the_log_is_watched_until_the_end_of_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """The thread reports by itself, and ends with `finish`; a second `finish` changes nothing."""
    handlers = list(logging.getLogger().handlers)
    reported = threading.Event()

    class Watched(StartupLog):
        def report(self) -> float:
            reported.set()
            return 0.0

    startup = Watched(0.0)
    startup.start("warming up")
    assert reported.wait(60)
    startup.finish()
    startup.finish()
    assert "startup-log" not in {thread.name for thread in threading.enumerate()}
    assert logging.getLogger().handlers == handlers


def test_the_time_before_the_start_is_no_silence(caplog: pytest.LogCaptureFixture) -> None:
    """A process that starts a server late does not log a step that has just begun."""
    clock = Clock()
    startup = StartupLog(4.0, clock)
    clock.time += 100
    with caplog.at_level(logging.INFO):
        startup.start("importing torch")
        startup.finish()
    assert caplog.messages == []
