"""`llama2-server`: flags and environment -> Settings -> serve."""

import asyncio
import logging
import sys
from typing import NoReturn

from llama2_server.settings_sources import BadSettings, read_settings


def main() -> None:
    """Serve; exit code 0 after a drain, 2 with one line on stderr when the server cannot start, 130 after Ctrl-C."""
    if sys.argv[1:2] in (["keys"], ["usage"], ["weights"]):
        from llama2_server.admin import admin

        admin(prog_name="llama2-server")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each of its plugins at every start
    shows_settings = sys.argv[1:2] == ["settings"]
    try:
        sourced = read_settings(sys.argv[1 + shows_settings :])
    except BadSettings as error:
        _refuse(str(error))
    if shows_settings:
        print(sourced)
        return
    # Only now the imports that take seconds: a wrong flag is refused at once.
    from llama2_server import app
    from llama2_server.accounts import KeysFileError
    from llama2_server.card import CardError
    from llama2_server.engine.errors import WeightsError
    from llama2_server.ledger.failures import LedgerError

    try:
        asyncio.run(app.serve(sourced.settings, app.load(sourced.settings)))
    except (CardError, KeysFileError, LedgerError, WeightsError, app.StartError) as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse(problem: str) -> NoReturn:
    for line in problem.splitlines():
        print(f"llama2-server: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
