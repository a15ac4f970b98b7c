"""A gRPC service for one Llama-2 model, as its model card describes it; `app.serve` puts the parts together."""
