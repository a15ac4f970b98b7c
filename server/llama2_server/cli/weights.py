"""`llama2-server weights`: fetch and check checkpoints."""

from pathlib import Path

import click

from llama2_server.cli.commands import CommandGroup


@click.group(cls=CommandGroup)
def weights() -> None:
    """Fetch checkpoints from the Hugging Face Hub, and check them."""


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
    later call resumes an interrupted fetch, and fetches a complete checkpoint only once. Each file must have the digest
    that the Hub lists. Gated models need HF_TOKEN in the environment.
    """
    from llama2_server.engine.checkpoint.hub.download import download_to

    fetched = download_to(directory, hub_id, revision, announce=click.echo)
    click.echo(f"{directory}: {'fetched' if fetched else 'already present'}")


@weights.command()
@click.argument("hub_id")
@click.option(
    "--in",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    required=True,
    help="Directory that another process fetches HUB_ID into.",
)
@click.option("--revision", metavar="REVISION", help="Revision of the fetch; the main branch by default.")
def wait(hub_id: str, directory: Path, revision: str | None) -> None:
    """Wait until a fetch of HUB_ID into DIRECTORY by another process is complete.

    It needs neither the Hub nor a token, and only reads DIRECTORY. Replicas wait with it for one fetch for all of them.
    """
    from llama2_server.engine.checkpoint.hub.download import wait_for_download

    wait_for_download(directory, hub_id, revision, announce=click.echo)
    click.echo(f"{directory}: complete")


@weights.command()
@click.argument("directory", type=click.Path(path_type=Path))
def check(directory: Path) -> None:
    """Print how many weights of the checkpoint in DIRECTORY fit in 12 bits without loss.

    It reads all weights but does not load the model. Weights that were converted from bfloat16 fit, as those of
    Llama-2. A CPU with AVX-512 or AMX reads them faster, and they take a quarter less memory (--cpu-weight-bits). The
    share depends on the CPU kernels: with amx, 16 rows of a matrix fit together or not (--cpu-kernels).
    """
    # torch is slow to import, and other commands do not need it.
    from llama2_server.engine.checkpoint.loader import measure_checkpoint

    kernels, share = measure_checkpoint(directory)
    click.echo(
        f"{directory}: {share} of the weights fit in 12 bits without loss: {share.size_bytes / 1e9:.2f} GB "
        f"in memory instead of {2 * share.total / 1e9:.2f} GB, with the {kernels} kernels"
    )
