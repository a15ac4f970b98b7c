"""What arrives before a handler runs: the check of messages, and the limit of calls without an API key."""
