"""`llama2-server serve`: check the settings, then load the model and serve it."""

import asyncio
import gc
import logging
import os
import sys
import threading
from typing import Any, NoReturn

import click

from llama2_server.cli.options import SettingsCommand
from llama2_server.cli.signals import stopped_by
from llama2_server.config.sources import read_settings


@click.command(cls=SettingsCommand)
def serve(**flags: Any) -> None:
    """Serve one model over gRPC (the default command).

    Every option is also an environment variable and a key of the settings file: --listen is LLAMA2_LISTEN and listen.

    \b
    Exit codes:
      0    graceful shutdown
      2    invalid configuration
      70   the engine failed; restart the process
      130  a second signal, or Ctrl-C before the server served
      143  SIGTERM before the server served
    """  # noqa: D301 - click's own escape: keep these lines unchanged
    resolved = read_settings(flags)
    # gRPC's own lines name no setting. Each error that they report has a line of the server.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Imports create no garbage; the collector would take a tenth of the startup time to find none.
    gc.disable()
    # The imports are slow, and torch takes seconds, so errors that need neither are reported first.
    from llama2_server.telemetry import logging as logs
    from llama2_server.telemetry.startup_log import STARTUP_LOG

    logs.configure(resolved.settings.log_level, resolved.settings.log_format)
    STARTUP_LOG.start("checking the settings")
    try:
        from llama2_server.lifecycle import preflight

        with resolved.naming_sources():
            inputs = preflight.check(resolved.settings)
            STARTUP_LOG.step("importing torch")
            from llama2_server import app
            from llama2_server.lifecycle.supervision import EXIT_ENGINE_FAILED
            from llama2_server.lifecycle.tasks import SignalIgnoringLoop

            gc.freeze()
            gc.enable()
            with asyncio.Runner(loop_factory=SignalIgnoringLoop) as runner:
                code = runner.run(app.serve(resolved.settings, inputs))
    finally:  # after a failed start, too
        STARTUP_LOG.finish()
        gc.enable()
    sys.stderr.write(stopped_by(code) or "")
    _exit(code, at_once=code == EXIT_ENGINE_FAILED)


def _exit(code: int, *, at_once: bool) -> NoReturn:
    """Exit without waiting for a thread that loads the model or hangs; only the end of the process stops it.

    With `at_once`, also skip the cleanup of libraries, which can block or crash after an error of the device.
    """
    if at_once or any(thread.daemon and thread.name in ("loading", "engine") for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
