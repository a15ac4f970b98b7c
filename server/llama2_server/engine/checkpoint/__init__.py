"""Find, check and load a Hugging Face Llama checkpoint."""
