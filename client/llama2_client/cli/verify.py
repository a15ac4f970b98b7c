"""`llama2 verify`: check a receipt offline, and on request by generating the reply again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import click

from llama2_client.cli.connection import ServerConnection
from llama2_client.cli.options import json_option
from llama2_client.cli.usage_errors import print_error_line

if TYPE_CHECKING:
    from llama2_client.aio.client import Client
    from llama2_client.receipts import ReceiptDocument, Statement

EXIT_NOT_VALID = 1


@click.command(short_help="Check the receipt in FILE.")
@click.argument("file", type=click.File("rb"))
@click.option(
    "--public-key",
    "public_keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE",
    help="Public key of the service, from its operator; can be repeated.",
)
@click.option("--replay", is_flag=True, help="Also generate the reply again, which costs quota and neurons.")
@json_option
@click.pass_obj
def verify(
    connection: ServerConnection, /, file: BinaryIO, public_keys: tuple[Path, ...], replay: bool, as_json: bool
) -> None:
    """Check the receipt in FILE, which `llama2 generate --save-receipt FILE` wrote; "-" reads standard input.

    Without --replay, no server is called: a valid receipt proves that the owner of the key sent this text as the reply
    to this request. With --replay, a server generates the reply again with the receipt's seed. If it has the
    receipt's fingerprint, the texts must be equal.
    """
    from llama2_client.receipts import ReceiptDocument, ReceiptError, read_public_key, verify_receipt

    try:
        document = ReceiptDocument.parse(file.read())
        statement = verify_receipt(document, [read_public_key(path) for path in public_keys])
    except (ReceiptError, OSError) as error:
        _fail(f"not verified: {file.name}: {error}")
    replayed = _replay(connection, document, statement, as_json=as_json) if replay else {}
    fields = {name: value for name, value in asdict(statement).items() if value is not None}
    texts = {"key_id": fields.pop("key_id"), "time": fields.pop("time").isoformat()} | fields | replayed
    if as_json:
        click.echo(json.dumps({"valid": True} | texts, default=str))
        return
    click.echo("valid: this text is the reply to this request")
    for name, value in texts.items():
        click.echo(f"{click.style(name.ljust(13), dim=True)}  {value}")


def _replay(
    connection: ServerConnection, document: ReceiptDocument, statement: Statement, *, as_json: bool
) -> dict[str, str]:
    """Generate the reply again; exit if it cannot be compared, or differs."""
    if statement.fingerprint is None:
        _fail("not replayed: the receipt has no fingerprint, so a server may give another text")
    options: dict[str, Any] = {**document.request, "seed": statement.seed, "no_cache": True}

    async def call(client: Client) -> tuple[str, str | None]:
        reply = await client.generate(options.pop("prompt", None), **options)
        return reply.text, reply.fingerprint

    text, fingerprint = connection.run(call, as_json=as_json)
    if fingerprint != statement.fingerprint:
        _fail(
            f"not replayed: the server has the fingerprint {fingerprint or 'of no text'}, the receipt has "
            f"{statement.fingerprint}; call a server with the same weights and kernels"
        )
    if text != document.response:
        _fail("replayed: the texts differ, although the fingerprints are equal")
    return {"replayed": "the text is equal"}


def _fail(message: str) -> NoReturn:
    print_error_line(message)
    raise click.exceptions.Exit(EXIT_NOT_VALID)
