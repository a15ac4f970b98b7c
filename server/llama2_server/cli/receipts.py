"""`llama2-server receipts`: make the key that signs receipts."""

from pathlib import Path

import click

from llama2_server.cli.commands import CommandGroup


@click.group(cls=CommandGroup)
def receipts() -> None:
    """Make keys that sign receipts."""


@receipts.command()
@click.argument("file", type=click.Path(path_type=Path))
def keygen(file: Path) -> None:
    """Write a new key to FILE, and its public key to FILE.pub.

    All replicas use one key (--receipt-key). Give the public key to everyone who verifies receipts. After a change of
    the key, keep the old public keys in one directory (--receipt-public-keys), so that old receipts stay valid.
    """
    from llama2_server.receipts.keys import public_file, write_new_key  # cryptography, which other commands do not need

    public = write_new_key(file)
    click.echo(public.key_id)
    click.echo(f"wrote {file}, which only its owner can read, and {public_file(file)}", err=True)
