"""The usage ledger on one machine: one SQLite file, and the thread that writes it."""
