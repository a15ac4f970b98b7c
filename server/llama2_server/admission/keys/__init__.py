"""The API keys file: keys, and the limits of their accounts."""
