"""The steps of the engine's thread: which sequences they advance, and what happens to the sampled tokens."""
