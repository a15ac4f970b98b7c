"""Local write-ahead journal of usage records."""
