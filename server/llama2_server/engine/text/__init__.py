"""Text: tokenizer, detokenizer and stop sequences."""
