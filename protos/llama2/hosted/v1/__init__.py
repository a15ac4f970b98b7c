"""Version 1 of the hosted endpoint; the module `hosted_endpoint_pb2` is generated."""
