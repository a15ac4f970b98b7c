"""Runs the cases against a server and reports the results."""
