"""Coalescing across replicas: equal requests on several replicas share one generation through Redis."""
