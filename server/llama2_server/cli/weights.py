"""`llama2-server weights`: checkpoints from the Hugging Face Hub."""

import os
import signal
from pathlib import Path

import click

from llama2_server.cli.commands import CommandGroup


@click.group(cls=CommandGroup)
def weights() -> None:
    """Fetch checkpoints from the Hugging Face Hub."""


@weights.command()
@click.argument("hub_id")
@click.option(
    "--to",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    required=True,
    help="Directory for the checkpoint; pass it as --weights.",
)
@click.option("--revision", metavar="REVISION", help="Commit, tag or branch; the main branch by default.")
def fetch(hub_id: str, directory: Path, revision: str | None) -> None:
    """Fetch HUB_ID from the Hugging Face Hub into DIRECTORY.

    An example of HUB_ID is meta-llama/Llama-2-7b-chat-hf. DIRECTORY appears only when the checkpoint is complete. A
    later call resumes an interrupted fetch, and fetches a complete checkpoint only once. Gated models need HF_TOKEN in
    the environment.
    """
    from llama2_server.engine.checkpoint.hub import download_to

    # The first process of a container ignores SIGTERM unless it has a handler. Files that are complete are kept.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    click.echo(f"{directory}: {'fetched' if download_to(directory, hub_id, revision) else 'already present'}")
