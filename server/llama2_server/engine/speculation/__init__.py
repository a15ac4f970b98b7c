"""Speculation: guesses of the next tokens, which one step checks; they change the speed and never the tokens."""
