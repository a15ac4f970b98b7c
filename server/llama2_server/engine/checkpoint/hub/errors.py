"""Errors of the Hugging Face Hub, each in one line with the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from llama2_server.engine.errors import WeightsError


@contextmanager
def named_hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Raise each error of the Hub library in the body as a WeightsError."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except WeightsError:
        raise
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository}: gated on the Hugging Face Hub; accept its license there and set HF_TOKEN, "
            "or download it on another machine and pass the directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repository}: neither a directory nor a model on the Hugging Face Hub that this HF_TOKEN can read; "
            "check the name, accept the license and set HF_TOKEN, or pass a directory"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(
            f"{repository}: has no revision {revision} on the Hugging Face Hub; "
            "pass a branch, a tag or a commit, or pass a directory"
        ) from error
    # The library's other exceptions depend on its version and transport: HTTP errors, timeouts, full disks, its cache.
    # They are all mapped here to one line for the operator.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{repository}: download from the Hugging Face Hub failed ({type(error).__name__}: {reason}); "
            "check the network and HF_TOKEN, or download it on another machine and pass the directory"
        ) from error
