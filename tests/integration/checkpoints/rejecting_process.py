"""Start the server with each of several checkpoints: `python -m tests.integration.checkpoints.rejecting_process`.

The arguments are a data directory and the directories of checkpoints that the server rejects. One process tries them
all, because the imports take seconds. It prints a JSON array of exit codes and standard errors.
"""

import contextlib
import io
import json
import sys

from llama2_server.cli.main import program


def main() -> None:
    """Print the result of each start."""
    data_directory, *checkpoints = sys.argv[1:]
    results: list[tuple[object, str]] = []
    for checkpoint in checkpoints:
        flags = ["--device", "cpu", "--listen", "127.0.0.1:0", "--data-directory", data_directory]
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                program.main(["--weights", checkpoint, *flags])
            except SystemExit as end:
                results.append((end.code, errors.getvalue()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
