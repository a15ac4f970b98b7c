"""Version 1 of the contract; `text_generation_pb2` and `model_pb2` are generated from the .proto files beside them."""
