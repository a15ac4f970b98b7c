"""Exit codes, and the exit of a command that cannot do what the user requested."""

import sys
from typing import NoReturn

EXIT_INVALID = 2
EXIT_INTERRUPTED = 130


def exit_with_error(message: str) -> NoReturn:
    """Print each line of the message on stderr after the program's name, and exit with 2."""
    for line in message.splitlines():
        sys.stderr.write(f"llama2-server: {line}\n")
    sys.exit(EXIT_INVALID)
