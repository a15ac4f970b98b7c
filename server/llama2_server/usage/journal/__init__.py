"""The local write-ahead journal of usage records."""
