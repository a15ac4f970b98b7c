"""Token ids to text, one token at a time."""

import codecs

from llama2_server.engine.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one generation into text as they come.

    The deltas join to exactly what SentencePiece decodes from all tokens at once, and none ends inside a character.
    Each token costs the same, however many came before.
    """

    def __init__(self, tokenizer: Tokenizer, keep_leading_space: bool) -> None:
        """A reply drops the space that SentencePiece puts before a text's first word; a continuation keeps it."""
        self._tokenizer = tokenizer
        self._piece_texts = tokenizer.piece_texts
        self._at_start = not keep_leading_space
        self._bytes = b""  # the start of a character whose other bytes may still come: at most three

    def decode(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        # An embedding may have more rows than the tokenizer has tokens; what such a row stands for is nothing.
        surface = self._piece_texts[token_id] if token_id < len(self._piece_texts) else ""
        if isinstance(surface, int):
            self._bytes += bytes((surface,))
            return self._append(self._decode_bytes(final=False))
        text = self.flush()
        return text + (self._decode_first(token_id) if self._at_start and surface else surface)

    def flush(self) -> str:
        """What is left at the end, or where another piece breaks a run of bytes: one U+FFFD for each byte."""
        return self._append(self._decode_bytes(final=True))

    def _append(self, text: str) -> str:
        self._at_start = self._at_start and not text
        return text

    def _decode_first(self, token_id: int) -> str:
        """The first visible token's text: only a piece loses its space, a byte and the unknown token keep theirs."""
        self._at_start = False
        return self._tokenizer.decode([token_id])

    def _decode_bytes(self, *, final: bool) -> str:
        """The complete characters among the bytes. A bad byte is one U+FFFD, and the next byte may start a character.

        This is SentencePiece's ProcessBytePieces; Python's own errors="replace" would merge several bad bytes into one.
        """
        text = ""
        while self._bytes:
            try:
                part, used = codecs.utf_8_decode(self._bytes, "strict", final)
            except UnicodeDecodeError as error:
                part, used = self._bytes[: error.start].decode() + "\ufffd", error.start + 1
            text += part
            self._bytes = self._bytes[used:]
            if used == 0:
                break
        return text
