"""Read the case files, and expand the abbreviations in their texts."""

import json
import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from conformance.v1 import conformance_pb2 as pb

CASES = Path(__file__).parent.parent / "cases"
REPEATED = re.compile(r"\{(.[^{}*]*)\*(\d+)\}", re.DOTALL)
PROFILES = tuple(name.removeprefix("PROFILE_").lower() for name, number in pb.Profile.items() if number)


class SuiteError(Exception):
    """A file or an argument that the kit cannot use; the message is one line."""


@dataclass(frozen=True, slots=True)
class StoredCase:
    """A case as its file has it, before the expansion of its texts."""

    name: str
    """FILE/NAME."""
    profile: str
    rule: str
    document: dict[str, Any]
    needs: tuple[str, ...] = ()
    """Further profiles, without which the case is not claimed."""

    def expand(self) -> pb.Case:
        """Return the case for one run, with a new random word for `{unique}`."""
        word = "".join(secrets.choice("bcdfghjklmnpqrstvwxz") for _ in range(12))
        case = pb.Case()
        ParseDict(expand(self.document, word), case)
        return case


def load_cases(folder: Path = CASES) -> list[StoredCase]:
    """Return the cases of all files in a folder, in the order of the files' names.

    Raises:
        SuiteError: a file is not a CaseFile, or two cases have one name.
    """
    cases = [case for path in sorted(folder.glob("*.json")) for case in _read(path)]
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise SuiteError(f"{folder}: two cases have the name {max(names, key=names.count)}; rename one")
    return cases


def select(cases: list[StoredCase], patterns: Collection[str]) -> list[StoredCase]:
    """Return the cases with one of these names, or with a name that starts with one of them.

    Raises:
        SuiteError: nothing has such a name.
    """
    for pattern in patterns:
        if not any(case.name.startswith(pattern) for case in cases):
            raise SuiteError(f"--case: no case starts with {pattern}; see conformance/cases")
    return [case for case in cases if not patterns or case.name.startswith(tuple(patterns))]


def _read(path: Path) -> Iterator[StoredCase]:
    document = json.loads(path.read_text(encoding="utf-8"))
    for entry in document["cases"]:
        name = f"{path.stem}/{entry.get('name')}"
        try:
            case = ParseDict(expand(entry, "word"), pb.Case())
        except ParseError as error:
            raise SuiteError(f"{path.name}: {name}: {error}") from error
        profile = PROFILES[max(case.profile, 1) - 1]
        yield StoredCase(name, profile, case.rule, entry, tuple(PROFILES[needed - 1] for needed in case.needs))


def expand(value: Any, word: str) -> Any:
    """Return a JSON value with its abbreviations expanded; `word` replaces `{unique}`."""
    match value:
        case str():
            return REPEATED.sub(lambda found: found[1] * int(found[2]), value.replace("{unique}", word))
        case list():
            return [expand(entry, word) for entry in value]
        case dict():
            return {expand(key, word): expand(entry, word) for key, entry in value.items()}
        case _:
            return value
