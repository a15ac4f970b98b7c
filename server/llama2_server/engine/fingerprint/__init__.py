"""The fingerprint: it names everything that decides the text of a reply."""
