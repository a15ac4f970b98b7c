"""Protobuf messages and gRPC stubs, one package per API version."""
