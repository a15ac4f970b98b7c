"""One reply in progress: task, text stream, coalescing, response cache, usage accounting."""
