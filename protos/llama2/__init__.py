"""The contract: protobuf messages and gRPC stubs, one package a version."""
