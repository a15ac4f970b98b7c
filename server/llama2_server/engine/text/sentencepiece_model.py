"""The SentencePiece model of a checkpoint, `tokenizer.model`."""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama2_server.engine.errors import WeightsError

SPACE_SYMBOL = "\u2581"  # represents a space in pieces


class SentencePieceModel:
    """Llama-2's published tokenizer."""

    strips_space_byte = False
    """Whether the first space of a text is dropped even if it is a byte token."""
    skips_silent_tokens = False
    """Whether a token without text may be between the bytes of a character."""

    def __init__(self, path: Path) -> None:
        """Raise WeightsError if `path` is not a SentencePiece model."""
        self._processor = _open(path)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without `<s>`; names of special tokens in it are text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return str(self._processor.decode(list(token_ids)))

    def token(self, token_id: int) -> str:
        """Return the name of a token."""
        return str(self._processor.id_to_piece(token_id))

    def piece_text(self, token_id: int) -> str | int:
        """Return the text of a token with its leading space, or the value of a byte token."""
        if self._processor.is_control(token_id):
            return ""
        if self._processor.is_unknown(token_id):
            return self.decode([token_id])
        piece = self.token(token_id)
        if self._processor.is_byte(token_id):
            return int(piece[1:-1], base=16)  # <0x0A>
        return piece.replace(SPACE_SYMBOL, " ")


def _open(path: Path) -> SentencePieceProcessor:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; copy it from the Llama-2 checkpoint")
    processor = SentencePieceProcessor()
    try:
        processor.Load(str(path))  # unlike the constructor, Load rejects an empty file
    except (RuntimeError, OSError) as error:
        raise WeightsError(f"{path}: not a SentencePiece model; copy it from the Llama-2 checkpoint again") from error
    return processor
