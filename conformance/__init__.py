"""Conformance kit: proves that a client or a server in any language follows the contract, without a large model."""
