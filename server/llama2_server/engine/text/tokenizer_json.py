"""The tokenizer of a checkpoint as current transformers saves it, `tokenizer.json`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.text.sentencepiece_model import SPACE_SYMBOL

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TokenizersTokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
REMEDY = "pass the tokenizer.json or the tokenizer.model of a Llama-2 checkpoint"
# The parts of Llama's tokenizers, from the first conversion of Llama-2 to current ones. The normalizers are older, and
# Metaspace replaces them. Any other part changes the text in a way that the detokenizer could not undo.
NORMALIZERS = (
    {"type": "Prepend", "prepend": SPACE_SYMBOL},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL},
)
DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # absent without a space before the first word
MAX_QUOTED_CHARACTERS = 100


class TokenizerJson:
    """A byte-fallback BPE tokenizer, run by the tokenizers library.

    The library can merge tokens of a text that starts with a space differently from `tokenizer.model`: its Metaspace
    adds no second space. All other texts have the same ids.
    """

    skips_silent_tokens = True
    """Whether a token without text may be between the bytes of a character."""

    def __init__(self, path: Path) -> None:
        """Raise WeightsError if `path` is not the tokenizer of a Llama checkpoint."""
        document = _read(path)
        _check_model(path, document["model"])
        _check_steps(path, document)
        self.strips_space_byte = _has_strip(path, document)
        """Whether the first space of a text is dropped even if it is a byte token."""
        self._tokenizer = _open(path)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # Special tokens beyond the rows of the embedding are harmless, because no text contains them.
        ids = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self.vocab_size: int = 1 + max({*ids, *(added.keys() - self._special_ids)})
        self.bos_id: int = self._id("<s>")
        self.eos_id: int = self._id("</s>")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without `<s>`; names of special tokens in it are text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all tokens; every byte of a run that is not valid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """Return the name of a token, or an empty string for an id without a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def piece_text(self, token_id: int) -> str | int:
        """Return the text of a token with its leading space, or the value of a byte token."""
        token = self.token(token_id)
        if token_id in self._special_ids:
            return ""
        return int(token[1:-1], base=16) if BYTE.fullmatch(token) else token.replace(SPACE_SYMBOL, " ")

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        return -1 if token_id is None else token_id


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; copy it from the Llama-2 checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON: {error}; copy it from the Llama-2 checkpoint again") from error
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise WeightsError(f"{path}: has no model of a tokenizer; {REMEDY}")
    return document


def _check_model(path: Path, model: dict[str, Any]) -> None:
    # Old versions of the library did not store the type of a BPE model.
    kind = model.get("type", "BPE" if "merges" in model else None)
    for name, found, expected in (
        ("type", kind, "BPE"),
        ("byte_fallback", model.get("byte_fallback", False), True),
        ("dropout", model.get("dropout") or None, None),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
        ("end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
    ):
        if found != expected:
            raise WeightsError(f"{path}: the model's {name} is {found!r}, expected {expected!r}; {REMEDY}")


def _check_steps(path: Path, document: dict[str, Any]) -> None:
    for step in _steps(document.get("normalizer"), "normalizers"):
        if step not in NORMALIZERS:
            raise WeightsError(f"{path}: has the normalizer {_quote(step)}, which Llama-2 does not have; {REMEDY}")
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if not isinstance(step, dict) or (step.get("type"), step.get("replacement")) != ("Metaspace", SPACE_SYMBOL):
            raise WeightsError(f"{path}: has the pre-tokenizer {_quote(step)}, which Llama-2 does not have; {REMEDY}")


def _has_strip(path: Path, document: dict[str, Any]) -> bool:
    steps = _steps(document.get("decoder"), "decoders")
    if steps not in (DECODERS, [*DECODERS, STRIP]):
        raise WeightsError(f"{path}: has the decoder {_quote(steps)}, expected Llama-2's; {REMEDY}")
    return STRIP in steps


def _steps(part: Any, key: str) -> list[Any]:
    """Return the steps of a part of the tokenizer, which may be missing, a single step or a sequence."""
    if part is None:
        return []
    if isinstance(part, dict) and part.get("type") == "Sequence" and isinstance(part.get(key), list):
        return list(part[key])
    return [part]


def _quote(step: object) -> str:
    text = json.dumps(step, ensure_ascii=False)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}…"


def _open(path: Path) -> "TokenizersTokenizer":
    from tokenizers import Tokenizer as TokenizersTokenizer  # not needed for a tokenizer.model

    try:
        tokenizer = TokenizersTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path}: the tokenizers library rejects it ({reason}); {REMEDY}") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
