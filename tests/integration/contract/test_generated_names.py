"""The names that other languages generate from the protos, and `buf.gen.yaml`, which replaces them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from google.protobuf.descriptor_pb2 import FileOptions
from tests.support.repository import ROOT

from llama2.hosted.v1 import hosted_endpoint_pb2
from llama2.v1 import account_pb2, error_reason_pb2, model_pb2, text_generation_pb2

BUF = Path(sys.executable).with_name("buf")
MODULES = (account_pb2, error_reason_pb2, model_pb2, text_generation_pb2)
FILES = tuple(module.DESCRIPTOR.name for module in MODULES)
# Types of the standard library or the protobuf runtime of a language that generates code for this contract.
COLLIDING = {"Any", "Duration", "Enum", "Error", "Field", "Message", "Method", "Object", "Status", "String", "Task"}
# A protoc plugin that generates nothing and prints the options of the files that it receives.
PLUGIN = """\
#!{python}
import json, sys
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.json_format import MessageToDict
request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
options = {{file.name: MessageToDict(file.options, preserving_proto_field_name=True) for file in request.proto_file}}
response = CodeGeneratorResponse()
response.file.add(name="options.json", content=json.dumps(options))
sys.stdout.buffer.write(response.SerializeToString())
"""


def test_the_protos_claim_only_reserved_names() -> None:
    """`example.com` and `com.example` are reserved for examples, and a Go module compiles with such an import path."""
    for module in MODULES:
        assert module.DESCRIPTOR.GetOptions() == FileOptions(
            go_package="example.com/llama2grpc/llama2/v1;llama2v1",
            java_package="com.example.llama2.v1",
            java_multiple_files=True,
            objc_class_prefix="LLM",
            csharp_namespace="Llama2.V1",
        )
    assert hosted_endpoint_pb2.DESCRIPTOR.GetOptions() == FileOptions(
        go_package="example.com/llama2grpc/llama2/hosted/v1;llama2hostedv1",
        java_package="com.example.llama2.hosted.v1",
        java_multiple_files=True,
        objc_class_prefix="LLH",
        csharp_namespace="Llama2.Hosted.V1",
    )


def test_no_type_has_the_name_of_a_standard_type() -> None:
    """`Task` and `Message` collide with types of Swift, C# and protobuf's own runtimes."""
    types = {name for module in MODULES for name in module.DESCRIPTOR.message_types_by_name}
    assert types & COLLIDING == set()


def test_buf_gen_chooses_other_names(tmp_path: Path) -> None:
    """`buf generate` runs the listed plugins, and they receive the names of the template instead of the protos' own."""
    template = yaml.safe_load((ROOT / "buf.gen.yaml").read_text(encoding="utf-8"))
    plugins = tmp_path / "bin"
    plugins.mkdir()
    entries = [dict(entry) for entry in template["plugins"]]
    for index, entry in enumerate(entries):
        entry.pop("protoc_builtin", None)
        entry |= {"local": f"plugin-{index}", "out": f"out-{index}"}
        plugin = plugins / f"plugin-{index}"
        plugin.write_text(PLUGIN.format(python=sys.executable))
        plugin.chmod(0o755)
    substitute = tmp_path / "buf.gen.yaml"
    substitute.write_text(yaml.safe_dump(template | {"plugins": entries}))
    command = [str(BUF), "generate", "--template", str(substitute), "--output", str(tmp_path)]
    path = f"{plugins}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, env=os.environ | {"PATH": path})
    for entry in entries:
        options = json.loads((tmp_path / entry["out"] / "options.json").read_text())
        for override in template["managed"]["override"]:
            assert {options[name][override["file_option"]] for name in FILES} == {override["value"]}
        assert not any(name.startswith("google/api/") for name in options)
