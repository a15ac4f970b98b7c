"""`llama2-server`: flags and environment -> Settings -> serve."""

import asyncio
import gc
import logging
import os
import sys
import threading
from typing import NoReturn

from llama2_server.cli.exit import refuse
from llama2_server.config.sources import BadSettings, read_settings
from llama2_server.configuration_error import ConfigurationError


def main() -> None:
    """Serve.

    Exit codes: 0 after a drain; 2 with one line on stderr when the server cannot start; 70 when the engine hung or
    died, and the process has to be started anew; 130 after a second signal.
    """
    if sys.argv[1:2] in (["keys"], ["usage"], ["weights"]):
        from llama2_server.cli.admin import admin

        admin(prog_name="llama2-server")
    shows_settings = sys.argv[1:2] == ["settings"]
    try:
        sourced = read_settings(sys.argv[1 + shows_settings :])
    except BadSettings as error:
        refuse(str(error))
    if shows_settings:
        print(sourced)
        return
    # Nothing that modules are made of is garbage: looking for it would take a tenth of the start.
    gc.disable()
    # Only now the imports that take long, and those of torch, which take seconds, after all that can be refused before.
    from llama2_server.lifecycle import preflight
    from llama2_server.telemetry import logging as logs

    logs.configure(sourced.settings.log_level, sourced.settings.log_format)
    try:
        preflight.check(sourced.settings)
        from llama2_server import app

        gc.freeze()
        gc.enable()
        code = asyncio.run(app.serve(sourced.settings))
    except ConfigurationError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End with this code, without waiting for a thread that loads or hangs: nothing but the end can stop those."""
    if any(thread.daemon and thread.name in ("loading", "engine") for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
