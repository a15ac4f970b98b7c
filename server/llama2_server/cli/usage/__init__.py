"""`llama2-server usage`: reports, and maintenance of the usage ledger."""
