"""Find, read and load a Hugging Face Llama checkpoint."""
