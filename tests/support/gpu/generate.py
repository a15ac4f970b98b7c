"""A process that generates on a GPU: `python -m tests.support.gpu.generate CHECKPOINT DEVICE ROUNDS`.

It waits for a line on standard input after it has prepared its steps, and prints the tokens of each round as JSON.
"""

import json
import sys
from pathlib import Path

from tests.support.gpu.engines import generated, load, running, some_ids


def main() -> None:
    """Generate the same replies in each round."""
    directory, device, rounds = sys.argv[1:]
    with running(load(Path(directory), device), "auto" if device == "cuda" else "torch") as engine:
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(int(rounds)):
            print(json.dumps(generated(engine, [some_ids(50, 1)], temperature=0.8, max_tokens=60)[0]), flush=True)


if __name__ == "__main__":
    main()
