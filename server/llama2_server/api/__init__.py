"""The gRPC surface: server, TLS, interceptor, servicers, validation, health; the only package that knows the protos."""
