"""Version 1 of the API; the modules `text_generation_pb2`, `model_pb2` and `account_pb2` are generated."""
