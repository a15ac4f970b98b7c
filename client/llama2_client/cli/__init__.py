"""The `llama2` command."""
