"""The text on the terminal when the service is ready."""

import os
import sys
from pathlib import Path

from llama2_server.config.settings import Settings
from llama2_server.lifecycle.checks.checkpoint import uses_demo_weights

PROMPT = "Tell me a story about a fox who lives by the sea."
METHOD = "llama2.v1.TextGenerationService/GenerateStream"
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEMO = (
    "This is a demo: a very small model that only tells short stories. Start the server with\n"
    "--card llama-2-7b-chat-fp16 --weights DIRECTORY to serve Llama 2."
)
LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # compared, not bound


def print_banner(address: str, settings: Settings) -> None:
    """Print the address, commands that call the service with these settings, and whether the model is the demo.

    The words in capitals are placeholders: KEY is an API key, CA.pem has the certificate authority of the server,
    CLIENT.pem and CLIENT.key are the client's certificate, and HOST is a name in the server's certificate.
    """
    commands = "\n".join(f"  {command}" for command in _commands(_reachable(address, settings), settings))
    print(f"SERVING on {address}. Press Ctrl-C to stop. In another terminal, try:\n\n{commands}\n", flush=True)
    if uses_demo_weights(settings):
        print(f"{DEMO}\n", flush=True)


def _reachable(address: str, settings: Settings) -> str:
    """Return the address for a client on this machine; a server that listens on every interface has no host."""
    host, _, port = address.rpartition(":")
    if host not in LOOPBACK:
        return address
    # A certificate rarely has a loopback address.
    return f"{LOOPBACK[host] if settings.tls_certificate is None else 'HOST'}:{port}"


def _commands(address: str, settings: Settings) -> list[str]:
    llama2_flags = "" if address == DEFAULT_ADDRESS else f"--address {address} "
    grpcurl_flags = "-plaintext "
    if settings.tls_certificate is not None:
        llama2_flags, grpcurl_flags = f"{llama2_flags}--ca CA.pem ", "-cacert CA.pem "
    if settings.tls_client_ca is not None:
        llama2_flags += "--certificate CLIENT.pem --key CLIENT.key "
        grpcurl_flags += "-cert CLIENT.pem -key CLIENT.key "
    commands = []
    if settings.api_keys_file is not None:
        commands.append("export LLAMA2_API_KEY=KEY")
        grpcurl_flags += '-H "authorization: Bearer $LLAMA2_API_KEY" '
    executable = Path(sys.executable).parent / "llama2"
    llama2 = os.path.relpath(executable) if executable.is_relative_to(Path.cwd()) else executable.name
    commands += [f'{llama2} {llama2_flags}generate "{PROMPT}"', f"{llama2} {llama2_flags}chat"]
    if settings.reflection:
        body = f'{{"prompt": "{PROMPT}"}}'
        commands.append(f"grpcurl {grpcurl_flags}-d '{body}' {address} {METHOD}")
    return commands
