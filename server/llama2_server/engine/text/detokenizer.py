"""Convert token ids to text incrementally."""

import codecs

from llama2_server.engine.text.tokenizer import Tokenizer


class Detokenizer:
    """Converts the tokens of one generation to text, one token at a time.

    The concatenated deltas equal the tokenizer's decoding of all tokens at once, and no delta ends inside a character.
    The exception is a run of bytes that is not valid UTF-8 in a `tokenizer.json`: its library replaces the whole run,
    and here the valid characters stay, as with SentencePiece. Otherwise they could not be sent before the run ends.
    The time per token does not depend on the number of earlier tokens.
    """

    def __init__(self, tokenizer: Tokenizer, keep_leading_space: bool) -> None:
        """Keep the space that the tokenizer adds before the first word in continuations; drop it in replies."""
        self._tokenizer = tokenizer
        self._piece_texts = tokenizer.piece_texts
        self._at_start = not keep_leading_space
        self._bytes = b""  # the first bytes of an incomplete character, at most three

    def decode(self, token_id: int) -> str:
        """Return the text that this token completes, which may be empty."""
        # An embedding may have more rows than the tokenizer has tokens; the extra rows have no text.
        piece_text = self._piece_texts[token_id] if token_id < len(self._piece_texts) else ""
        if isinstance(piece_text, int):
            self._bytes += bytes((piece_text,))
            return self._append(self._decode_bytes(final=False))
        if not piece_text and self._tokenizer.skips_silent_tokens:
            return ""
        text = self.flush()
        return text + (self._decode_first(token_id) if self._at_start and piece_text else piece_text)

    def flush(self) -> str:
        """Return one U+FFFD for each pending byte; called at the end, and before a token that is not a byte."""
        return self._append(self._decode_bytes(final=True))

    def _append(self, text: str) -> str:
        """Return the text of bytes, without its first space if it is at the start and the tokenizer strips it."""
        strips = self._at_start and self._tokenizer.strips_space_byte
        self._at_start = self._at_start and not text
        return text.removeprefix(" ") if strips else text

    def _decode_first(self, token_id: int) -> str:
        """Return the first visible text; pieces lose their leading space."""
        self._at_start = False
        return self._tokenizer.decode([token_id])

    def _decode_bytes(self, *, final: bool) -> str:
        """Remove and return the complete characters at the start of the pending bytes.

        An invalid byte becomes one U+FFFD, and the next byte may start a character. The algorithm is SentencePiece's
        ProcessBytePieces. Python's errors="replace" would merge several invalid bytes into one U+FFFD.
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
