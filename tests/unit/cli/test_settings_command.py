"""`llama2-server settings`: the settings in force."""

from tests.unit.cli.runner import output

from llama2_server.config.settings import Settings
from llama2_server.config.sources import ResolvedSettings


def test_settings_command_prints_the_settings_in_force() -> None:
    """The output is the settings of a server with the same flags and environment, and their sources."""
    printed = output("settings", "--max-queue-size", "9", LLAMA2_DEVICE="cpu")
    settings = Settings(max_queue_size=9, device="cpu")
    sources = {"max_queue_size": "--max-queue-size", "device": "LLAMA2_DEVICE"}
    assert printed == f"{ResolvedSettings(settings, sources)}\n"
