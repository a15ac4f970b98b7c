"""Other programs that serve Llama checkpoints, behind a thin adapter to the contract."""
