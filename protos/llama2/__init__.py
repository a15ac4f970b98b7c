"""Protobuf messages and gRPC stubs, one package per version: `v1` is the API, `hosted.v1` the hosted endpoint."""
