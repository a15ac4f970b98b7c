"""Reflection, v1 and v1alpha: the services, their files with comments, and answers to unusual questions."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse
from tests.support.service import Service, ServiceMaker

from llama2_server.api.reflection import REFLECTION_SERVICES
from llama2_server.api.server import SERVICES

NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]


async def ask(service: Service, name: str, **question: Any) -> ServerReflectionResponse:
    """Return the response to one question; the bytes of v1 and v1alpha are equal."""
    request = ServerReflectionRequest(host="example.com", **question)
    method: Any = service.channel.stream_stream(
        f"/{name}/ServerReflectionInfo",
        ServerReflectionRequest.SerializeToString,
        ServerReflectionResponse.FromString,
    )
    (response,) = [response async for response in method(iter([request]))]
    assert isinstance(response, ServerReflectionResponse)
    assert (response.original_request, response.valid_host) == (request, "example.com")
    return response


def files(response: ServerReflectionResponse) -> dict[str, FileDescriptorProto]:
    """Return the files of a response by name."""
    sent = response.file_descriptor_response.file_descriptor_proto
    return {file.name: file for file in map(FileDescriptorProto.FromString, sent)}


@pytest.fixture
async def service(serve_scripted: ServiceMaker) -> AsyncIterator[Service]:
    """A service with reflection."""
    async with serve_scripted() as running:
        yield running


@pytest.mark.parametrize("name", REFLECTION_SERVICES)
async def test_it_lists_every_service(service: Service, name: str) -> None:
    """Both versions list all services of the port, themselves included."""
    response = await ask(service, name, list_services="")
    listed = [entry.name for entry in response.list_services_response.service]
    assert listed == [*SERVICES, "grpc.health.v1.Health", *REFLECTION_SERVICES]
    for entry in listed:
        found = files(await ask(service, name, file_containing_symbol=entry))
        assert any(f"{file.package}.{one.name}" == entry for file in found.values() for one in file.service)


@pytest.mark.parametrize("name", REFLECTION_SERVICES)
@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        ("llama2.v1.TextGenerationService.Generate", "text_generation"),
        ("llama2.v1.GenerateRequest", "text_generation"),
        ("llama2.v1.GenerateRequest.top_p", "text_generation"),
        ("llama2.v1.AccountService", "account"),
        ("llama2.v1.ModelTask", "model"),
        ("llama2.v1.ErrorReason", "error_reason"),
        ("llama2.hosted.v1.HostedEndpointService.Run", "hosted_endpoint"),
    ],
)
async def test_the_file_of_a_symbol_has_comments_and_imports(
    service: Service, name: str, symbol: str, file: str
) -> None:
    """Files come with their comments and their imports."""
    found = files(await ask(service, name, file_containing_symbol=symbol))
    package = "llama2/hosted/v1" if "hosted" in symbol else "llama2/v1"
    path = f"{package}/{file}.proto"
    assert next(iter(found)) == path
    assert {imported for one in found.values() for imported in one.dependency} <= set(found)
    assert any(location.leading_comments for location in found[path].source_code_info.location)
    assert files(await ask(service, name, file_by_filename=path)) == found


@pytest.mark.parametrize(
    "question",
    [
        {"file_containing_symbol": "llama2.v1.Nothing"},
        {"file_containing_symbol": "llama2.v1.TextGenerationService.Guess"},
        {"file_containing_symbol": ""},
        {"file_by_filename": "nothing.proto"},
        {"file_containing_extension": {"containing_type": "llama2.v1.Usage", "extension_number": 7}},
        {"file_containing_extension": {"containing_type": "llama2.v1.Nothing", "extension_number": 7}},
        {"all_extension_numbers_of_type": "llama2.v1.Nothing"},
    ],
    ids=str,
)
async def test_an_unknown_name_is_not_found(service: Service, question: dict[str, Any]) -> None:
    """The stream continues; NOT_FOUND is inside the response."""
    response = await ask(service, REFLECTION_SERVICES[0], **question)
    assert response.error_response.error_code == NOT_FOUND


async def test_a_type_without_extensions_has_none(service: Service) -> None:
    """The answer is an empty list and not an error."""
    response = await ask(service, REFLECTION_SERVICES[0], all_extension_numbers_of_type="llama2.v1.Usage")
    answer = response.all_extension_numbers_response
    assert (answer.base_type_name, list(answer.extension_number)) == ("llama2.v1.Usage", [])


async def test_a_request_without_a_question_is_not_valid(service: Service) -> None:
    """INVALID_ARGUMENT inside the response."""
    response = await ask(service, REFLECTION_SERVICES[0])
    assert response.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.mark.parametrize("detail", ["ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo", "RequestInfo", "Status"])
async def test_the_error_details_are_described(service: Service, detail: str) -> None:
    """Without their descriptors, grpcurl prints the details of an error as bytes."""
    found = files(await ask(service, REFLECTION_SERVICES[0], file_containing_symbol=f"google.rpc.{detail}"))
    assert detail in {message.name for file in found.values() for message in file.message_type}
