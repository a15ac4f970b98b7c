"""Start and stop: preflight, stores, model loading, warm-up, probes, readiness, drain."""
