"""`llama2-server keys`: API keys for the API keys file."""

import click

from llama2_server.cli.commands import CommandGroup


@click.group(cls=CommandGroup)
def keys() -> None:
    """Create API keys for the API keys file."""


@keys.command()
@click.argument("account")
@click.option("--name", default="", metavar="TEXT", help="Name of the account's owner; a note in the file.")
def new(account: str, name: str) -> None:
    """Print a new API key for ACCOUNT and the entry that makes the key valid.

    Send the key to its owner. Add the entry to the server's --api-keys-file, under `keys:`. The entry does not contain
    the key, so the key cannot be recovered. To revoke the key, delete the entry. To disable it, set `enabled: false`.
    """
    from llama2_server.admission.keys_file import new_key  # imports YAML, which other commands do not need

    key, entry = new_key(account, name)
    click.echo(f"# API key, shown only once:\n{key}\n\n# Entry for the API keys file, under `keys:`\n  {entry}")
