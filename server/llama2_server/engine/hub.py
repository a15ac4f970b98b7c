"""Where the weights come from: a directory, or the Hugging Face Hub."""

import re
from pathlib import Path

from llama2_server.engine.errors import WeightsError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
NEEDED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def fetch_checkpoint(weights: str) -> Path:
    """The directory of a checkpoint, given that directory or an `org/name` on the Hub, which is downloaded once.

    The library takes its token from the environment (HF_TOKEN) and shows its own progress. Raises WeightsError, with
    what to do about it, where there is no such directory or the Hub does not hand the checkpoint out.
    """
    directory = Path(weights).expanduser()
    if weights and directory.is_dir():
        return directory
    if not HUB_ID.fullmatch(weights):
        raise WeightsError(f"{weights}: no such directory, and not an org/name on the Hugging Face Hub either")
    return _download(weights)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download  # a server that starts from a directory does without
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(NEEDED)))
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository}: gated on the Hugging Face Hub; accept its licence there and set HF_TOKEN, "
            "or download it on another machine and pass the directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repository}: neither a directory here nor a model on the Hugging Face Hub that this HF_TOKEN may see; "
            "check the name, set HF_TOKEN after accepting the licence, or pass a directory"
        ) from error
    # What else the library raises depends on its version and transport (HTTP errors, time-outs, full disks, its cache):
    # this is the one seam where all of it becomes a line for the operator.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{repository}: could not be fetched from the Hugging Face Hub; check the network and HF_TOKEN, "
            f"or download it on another machine and pass the directory ({type(error).__name__}: {reason})"
        ) from error
