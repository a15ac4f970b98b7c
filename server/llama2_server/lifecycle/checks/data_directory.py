"""Whether the data directory can hold the usage records of the first requests."""

import os
import shutil
import tempfile

from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.usage.local.local_ledger import check_directory

REMEDY = "pass another --data-directory"
RECORD_BYTES = 512  # of a usage record on disk


def check_data_directory(settings: Settings) -> None:
    """Create the directory if it is missing, and check that it is writable, local, and has room for usage records.

    Raises:
        ConfigurationError: it cannot be used.
    """
    directory = settings.data_directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigurationError(
            f"--data-directory: {directory} cannot be written: {reason}; make it writable, or {REMEDY}"
        ) from error
    check_directory(directory)
    needed_bytes = settings.usage_max_pending_records * RECORD_BYTES
    if free_bytes < needed_bytes:
        raise ConfigurationError(
            f"--data-directory: {directory} has {free_bytes / 1e6:.1f} MB free, expected at least "
            f"{needed_bytes / 1e6:.1f} MB for usage records; free space, or {REMEDY}"
        )
