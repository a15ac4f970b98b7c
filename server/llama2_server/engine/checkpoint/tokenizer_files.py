"""Select the file of a checkpoint's tokenizer."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_LOGGED_TOKENS = 10


def open_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint: `tokenizer.model`, or else `tokenizer.json`.

    If a `tokenizer.model` is used, one log line lists the tokens that other files add to it.

    Raises:
        WeightsError: the checkpoint has neither file, or the file cannot be used.
    """
    model, document = directory / "tokenizer.model", directory / "tokenizer.json"
    if not model.is_file() and document.is_file():
        return Tokenizer(document)
    if not model.is_file():
        raise WeightsError(f"{model}: no such file, and no tokenizer.json; copy either from the Llama-2 checkpoint")
    tokenizer = Tokenizer(model)
    added = [(token_id, token) for token_id, token in _added_tokens(directory) if tokenizer.token(token_id) != token]
    if added:
        names = ", ".join(f"{token} ({token_id})" for token_id, token in sorted(added)[:MAX_LOGGED_TOKENS])
        more = f" and {len(added) - MAX_LOGGED_TOKENS} more" if len(added) > MAX_LOGGED_TOKENS else ""
        logger.info("tokenizer.model is used; in a text, the added tokens %s%s are ordinary text", names, more)
    return tokenizer


def _added_tokens(directory: Path) -> Iterator[tuple[int, str]]:
    """Yield the id and the name of the added tokens; unreadable files add none, because the server needs none."""
    try:
        if (directory / "tokenizer.json").is_file():
            for token in _read(directory / "tokenizer.json")["added_tokens"]:
                yield int(token["id"]), str(token["content"])
        elif (directory / "added_tokens.json").is_file():
            for name, token_id in _read(directory / "added_tokens.json").items():
                yield int(token_id), str(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())
