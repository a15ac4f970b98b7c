"""The `llama2-server` command line."""
