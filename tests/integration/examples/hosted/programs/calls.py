"""Calls that each client makes, in its own environment; the results go to standard output as JSON."""

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

PROMPT = "Tell me a story."
LONG = "x" * 4097


class Arguments(NamedTuple):
    """The command line: what an application of the hosted endpoint configures."""

    base_url: str
    account: str
    key: str
    model: str


Call = Callable[[Arguments, str], object]


def run(unary: Call, stream: Call, error: Callable[[Exception], object]) -> None:
    """Print the results of a reply, of a stream, of a request that is not valid, and of one that exceeds the quota."""
    arguments = Arguments(*sys.argv[1:])
    results = {"unary": unary(arguments, PROMPT), "stream": stream(arguments, PROMPT)}
    for name, prompt in (("invalid", LONG), ("quota", PROMPT)):
        try:
            unary(arguments, prompt)
        except Exception as exception:
            results[name] = error(exception)
    print(json.dumps(results))
