"""`llama2 chat`: the conversation and its commands."""
