"""The text on the terminal when the service is ready."""

import os
import sys
from pathlib import Path

PROMPT = "Tell me a story about a fox who lives by the sea."
METHOD = "llama2.v1.TextGenerationService/GenerateStream"


def print_banner(address: str, *, tls: bool) -> None:
    """Print the address, and commands that call the service."""
    address_flag = "" if address == "127.0.0.1:50051" else f"--address {address} "
    tls_flag = "-plaintext "
    if tls:
        address_flag, tls_flag = f"{address_flag}--ca CA.pem ", "-cacert CA.pem "
    command = Path(sys.executable).parent / "llama2"
    llama2 = os.path.relpath(command) if command.is_relative_to(Path.cwd()) else command.name
    body = f'{{"prompt": "{PROMPT}"}}'
    print(
        f"SERVING on {address}. Press Ctrl-C to stop. In another terminal, try:\n\n"
        f'  {llama2} {address_flag}generate "{PROMPT}"\n'
        f"  {llama2} {address_flag}chat\n"
        f"  grpcurl {tls_flag}-d '{body}' {address} {METHOD}\n",
        flush=True,
    )
