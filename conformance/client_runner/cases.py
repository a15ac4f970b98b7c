"""Read the cases for clients."""

import json
from pathlib import Path

from google.protobuf.json_format import ParseDict, ParseError

from conformance.server_runner.suite import SuiteError, expand
from conformance.v1 import conformance_pb2 as pb

KILLS = Path(__file__).parent / "kills.json"
CLIENT_CASES = Path(__file__).parent / "cases.json"


def read_client_kills() -> dict[str, list[str]]:
    """Return the names of the cases that must fail, by client mutant."""
    kills: dict[str, list[str]] = json.loads(KILLS.read_text())
    return kills


def load_client_cases(path: Path = CLIENT_CASES) -> list[pb.ClientCase]:
    """Return the cases in order.

    Raises:
        SuiteError: the file is not a ClientCaseFile.
    """
    try:
        document = expand(json.loads(path.read_text(encoding="utf-8")), "word")
        return list(ParseDict(document, pb.ClientCaseFile()).cases)
    except ParseError as error:
        raise SuiteError(f"{path.name}: {error}") from error
