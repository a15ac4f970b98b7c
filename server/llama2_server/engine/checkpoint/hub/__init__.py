"""Checkpoints on the Hugging Face Hub: what a download needs, and the download."""
