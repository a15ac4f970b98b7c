"""The program `llama2`, also as `python -m llama2_client.cli`."""

from llama2_client.cli.signals import exit_on_signals


def main() -> None:
    """Run the command line of this process."""
    exit_on_signals()
    from llama2_client.cli.main import main as run  # after the handlers: a signal may arrive during this import

    run()


if __name__ == "__main__":
    main()
