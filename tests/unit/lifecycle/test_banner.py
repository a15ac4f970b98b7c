"""The commands of the start message; tests/integration/contract/test_commands.py runs them."""

import re

import pytest

from llama2_server.config.settings import Settings
from llama2_server.lifecycle.banner import DEMO, print_banner

TLS = {"tls_certificate": "tls.crt", "tls_key": "tls.key"}


@pytest.mark.parametrize(
    ("address", "settings", "used"),
    [
        ("127.0.0.1:50051", {}, "127.0.0.1:50051"),
        ("127.0.0.1:5", TLS, "127.0.0.1:5"),
        ("0.0.0.0:5", {}, "127.0.0.1:5"),
        ("[::]:5", {}, "[::1]:5"),
        ("[::]:5", TLS, "HOST:5"),
        ("llama2.internal:5", {}, "llama2.internal:5"),
    ],
)
def test_a_client_can_reach_the_address(
    address: str, settings: dict[str, object], used: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No client connects to 0.0.0.0 or [::]. The default address needs no flag."""
    print_banner(address, Settings.model_validate(settings))
    start = capsys.readouterr().out.removesuffix(f"{DEMO}\n\n")
    first, _, *commands = start.rstrip().splitlines()
    assert first == f"SERVING on {address}. Press Ctrl-C to stop. In another terminal, try:"
    assert f" {used} llama2.v1" in commands.pop()
    for command in commands:
        assert (f"--address {used} " in command) is (used != "127.0.0.1:50051")


def test_there_is_no_grpcurl_command_without_reflection(capsys: pytest.CaptureFixture[str]) -> None:
    """It would need the protos."""
    print_banner("127.0.0.1:50051", Settings.model_validate({"reflection": False}))
    commands = capsys.readouterr().out.removesuffix(f"{DEMO}\n\n")
    assert re.findall(r"\b(generate|chat|grpcurl)\b", commands) == ["generate", "chat"]


@pytest.mark.parametrize(
    ("settings", "is_demo"),
    [({}, True), ({"card": "llama-2-7b-chat-fp16", "weights": "demo"}, True), ({"weights": "/llama"}, False)],
)
def test_the_start_message_says_that_the_model_is_a_demo(
    settings: dict[str, object], is_demo: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the flags for the real model."""
    print_banner("127.0.0.1:50051", Settings.model_validate(settings))
    assert capsys.readouterr().out.endswith(f"{DEMO}\n\n") is is_demo
