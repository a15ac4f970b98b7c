"""docs/api.md describes every RPC, field, enum value and error reason."""

from google.protobuf.descriptor import FileDescriptor
from tools import api_reference

from llama2.hosted.v1 import hosted_endpoint_pb2
from llama2.v1 import account_pb2, error_reason_pb2, model_pb2, text_generation_pb2
from llama2_server.errors import ServiceError

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR for module in (text_generation_pb2, account_pb2, model_pb2, error_reason_pb2, hosted_endpoint_pb2)
)


def test_the_page_is_up_to_date() -> None:
    """docs/api.md is the generated page; otherwise run `make docs`."""
    assert api_reference.PAGE.read_text(encoding="utf-8") == api_reference.render()


def test_the_page_has_every_name_of_the_protos() -> None:
    """The page has a heading for each message, enum, service and RPC, and a row for each field and enum value."""
    lines = api_reference.render().splitlines()
    for file in FILES:
        headings = [f"### {name}" for kind in ("message", "enum", "service") for name in _names(file, kind)]
        headings += [f"#### {name}" for service in file.services_by_name.values() for name in service.methods_by_name]
        assert [heading for heading in headings if heading not in lines] == []
        rows = [name for message in file.message_types_by_name.values() for name in message.fields_by_name]
        rows += [name for enum in file.enum_types_by_name.values() for name in enum.values_by_name]
        assert [name for name in rows if not any(line.startswith(f"| `{name}` |") for line in lines)] == []


def test_the_page_has_every_error_with_its_details() -> None:
    """The last table has one row per error reason; the details are read from a real status."""
    table = api_reference.render().rpartition("|---|---|---|---|\n")[2].splitlines()
    reasons = [row.split("`")[1] for row in table]
    assert sorted(reasons) == sorted(_reasons(ServiceError))
    (quota,) = (row for row in table if "`QUOTA_EXCEEDED`" in row)
    assert quota.endswith("| `QuotaFailure`, `RetryInfo` |")


def _names(file: FileDescriptor, kind: str) -> list[str]:
    return list(
        {"message": file.message_types_by_name, "enum": file.enum_types_by_name}.get(kind, file.services_by_name)
    )


def _reasons(base: type[ServiceError]) -> set[str]:
    own = {base.reason} if "reason" in vars(base) else set()
    return own.union(*map(_reasons, base.__subclasses__()))
