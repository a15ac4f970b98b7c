"""The enum ErrorReason of the protos, and the errors of the server."""

from importlib import resources

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import Message
from tools.api_reference import ARGUMENTS

from llama2.v1 import error_reason_pb2
from llama2_server.errors import ServiceError

PREFIX = "ERROR_REASON_"
ENUM_PATH = (5, 0)  # the first enum of a file
VALUE = 2  # a value of an enum


def test_the_enum_has_exactly_the_reasons_of_the_errors() -> None:
    """Each value is the prefix and a reason; 0 is UNSPECIFIED and no error has that reason."""
    expected = {"ERROR_REASON_UNSPECIFIED"} | {PREFIX + error.reason for error in errors(ServiceError)}
    assert set(error_reason_pb2.ErrorReason.keys()) == expected
    assert error_reason_pb2.ErrorReason.Value("ERROR_REASON_UNSPECIFIED") == 0
    assert "UNSPECIFIED" not in {error.reason for error in errors(ServiceError)}


def test_each_comment_starts_with_the_code_and_the_details() -> None:
    """Such as "RESOURCE_EXHAUSTED with QuotaFailure and RetryInfo.", and then says what a client does."""
    comments = value_comments()
    for error in errors(ServiceError):
        first, _, advice = comments[PREFIX + error.reason].partition(". ")
        details = " and ".join(sorted(detail_names(error(*ARGUMENTS.get(error, ())))))
        assert first == (f"{error.code.name} with {details}" if details else error.code.name)
        assert advice.count(". ") >= 1


def errors(base: type[ServiceError]) -> list[type[ServiceError]]:
    """Return every error class that has its own reason."""
    own = [base] if "reason" in vars(base) else []
    return own + [error for child in base.__subclasses__() for error in errors(child)]


def detail_names(error: ServiceError) -> list[str]:
    """Return the types of an error's details, in addition to ErrorInfo and RequestInfo."""
    details: list[Message] = error.details()
    retry = [] if error.retry_after_seconds is None else ["RetryInfo"]
    return [detail.DESCRIPTOR.name for detail in details] + retry


def value_comments() -> dict[str, str]:
    """Return the comment of each value of ErrorReason, on one line, from the packaged descriptors."""
    data = (resources.files("llama2.v1") / "descriptors.pb").read_bytes()
    files: dict[str, FileDescriptorProto] = {file.name: file for file in FileDescriptorSet.FromString(data).file}
    file = files["llama2/v1/error_reason.proto"]
    comments = {tuple(location.path): location.leading_comments for location in file.source_code_info.location}
    return {
        value.name: " ".join(comments[*ENUM_PATH, VALUE, index].split())
        for index, value in enumerate(file.enum_type[0].value)
    }
