"""How a command ends that cannot do what the operator asked for."""

import sys
from typing import NoReturn


def refuse(problem: str) -> NoReturn:
    """Say on stderr why, each line under the program's name, and exit with 2."""
    for line in problem.splitlines():
        sys.stderr.write(f"llama2-server: {line}\n")
    sys.exit(2)
