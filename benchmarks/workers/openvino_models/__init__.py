"""Peers that run a model in OpenVINO's format."""
