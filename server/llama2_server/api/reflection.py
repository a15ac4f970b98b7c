"""gRPC reflection over descriptors with comments, so that `grpcurl describe` prints the documentation.

The stock servicer reads the descriptors of the stubs, which have no comments, and serves only version v1alpha. The
messages of v1 and v1alpha have the same bytes, so one servicer serves both names.
"""

from collections.abc import AsyncIterator, Iterable
from importlib import resources
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToJson, Parse
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from llama2_server.configuration_error import ConfigurationError

REFLECTION_SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
Request = reflection_pb2.ServerReflectionRequest
Response = reflection_pb2.ServerReflectionResponse


class ReflectionServicer:
    """Answers questions about the services of a server from the descriptors of their files.

    Args:
        services: full names of the services to list.
        files: the files of these services, each one after the files that it imports.
    """

    def __init__(self, services: Iterable[str], files: Iterable[FileDescriptorProto]) -> None:
        self._services = tuple(services)
        self._pool = DescriptorPool()
        # The pool drops the comments, so the files' own bytes are sent.
        self._files = {file.name: file.SerializeToString() for file in files}
        for data in self._files.values():
            self._pool.AddSerializedFile(data)

    async def ServerReflectionInfo(self, requests: AsyncIterator[Request], context: Any) -> AsyncIterator[Response]:
        """Answer each request with one response; what does not exist is NOT_FOUND inside the response."""
        async for request in requests:
            response = Response(valid_host=request.host, original_request=request)
            try:
                self._answer(request, response)
            except KeyError:
                response.error_response.error_code = grpc.StatusCode.NOT_FOUND.value[0]
                response.error_response.error_message = "not found"
            yield response

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the servicer under the names of both versions."""
        handler: Any = grpc.stream_stream_rpc_method_handler(
            self.ServerReflectionInfo, Request.FromString, Response.SerializeToString
        )
        for service in REFLECTION_SERVICES:
            methods = {"ServerReflectionInfo": handler}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))

    def _answer(self, request: Request, response: Response) -> None:
        """Set the answer; raises KeyError if the name is unknown."""
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            for name in self._services:
                response.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            self._set_files(response, self._pool.FindFileByName(request.file_by_filename))
        elif kind == "file_containing_symbol":
            self._set_files(response, self._file_of(request.file_containing_symbol))
        elif kind == "file_containing_extension":
            extension = request.file_containing_extension
            extended = self._pool.FindMessageTypeByName(extension.containing_type)
            found: Any = self._pool.FindExtensionByNumber(extended, extension.extension_number)
            self._set_files(response, found.file)
        elif kind == "all_extension_numbers_of_type":
            extended = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
            response.all_extension_numbers_response.base_type_name = extended.full_name
            numbers = sorted(extension.number for extension in self._pool.FindAllExtensions(extended))
            response.all_extension_numbers_response.extension_number.extend(numbers)
        else:
            response.error_response.error_code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            response.error_response.error_message = (
                "the request asks for nothing; set one of its message_request fields"
            )

    def _file_of(self, symbol: str) -> FileDescriptor:
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:  # the pool finds everything except methods
            service, _, method = symbol.rpartition(".")
            return self._pool.FindServiceByName(service).methods_by_name[method].containing_service.file

    def _set_files(self, response: Response, file: FileDescriptor) -> None:
        """Add a file and all its imports, which saves the client a request for each of them."""
        names: dict[str, None] = {}
        pending = [file]
        while pending:
            names[(current := pending.pop()).name] = None
            pending += [imported for imported in current.dependencies if imported.name not in names]
        response.file_descriptor_response.file_descriptor_proto.extend(self._files[name] for name in names)


def described_files() -> list[FileDescriptorProto]:
    """Return the protos with their comments, the error details, health and both reflection versions.

    Clients need the error details to print an error; no proto imports them.

    Raises:
        ConfigurationError: the installation is older than the protos.
    """
    try:
        data = (resources.files("llama2.v1") / "descriptors.pb").read_bytes()
    except FileNotFoundError as error:
        message = "llama2/v1/descriptors.pb: is missing; reinstall llama2-grpc, or run `make proto` in a clone"
        raise ConfigurationError(message) from error
    health, v1alpha = _descriptor(health_pb2), _descriptor(reflection_pb2)
    v1 = Parse(MessageToJson(v1alpha).replace("v1alpha", "v1"), FileDescriptorProto())
    errors = [_descriptor(module) for module in (any_pb2, status_pb2, error_details_pb2)]
    return [*FileDescriptorSet.FromString(data).file, *errors, health, v1alpha, v1]


def _descriptor(module: Any) -> FileDescriptorProto:
    file = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return file
