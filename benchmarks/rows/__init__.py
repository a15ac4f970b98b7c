"""Measurements of steps with several rows: prompt lookup, and prompts that arrive among running replies."""
