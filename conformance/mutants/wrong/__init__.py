"""The wrong behaviors of servers."""
