"""Write the descriptor set that Envoy's transcoder reads: `python descriptors.py llama2.pb`.

It comes from the installed `llama2-grpc`; the base install is enough. It needs neither a compiler nor a network.
"""

import sys
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2

from llama2.hosted.v1 import hosted_endpoint_pb2
from llama2.v1 import account_pb2, model_pb2, text_generation_pb2

# The protos do not import the error details, whose types Envoy needs to print an error as JSON.
FILES = (text_generation_pb2, model_pb2, account_pb2, hosted_endpoint_pb2, error_details_pb2)


def descriptor_set() -> FileDescriptorSet:
    """Return the protos, the error details and all imports; each file follows the files that it imports."""
    files = FileDescriptorSet()
    seen: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in seen:
            seen.add(file.name)
            for imported in file.dependencies:
                add(imported)
            file.CopyToProto(files.file.add())

    for module in FILES:
        add(module.DESCRIPTOR)
    return files


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python descriptors.py FILE")
    Path(sys.argv[1]).write_bytes(descriptor_set().SerializeToString())
