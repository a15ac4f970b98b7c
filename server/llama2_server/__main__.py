"""The program `llama2-server`, also as `python -m llama2_server`."""

from llama2_server.cli.signals import exit_on_signals


def main() -> None:
    """Run the command line of this process."""
    exit_on_signals()
    from llama2_server.cli.main import main as run  # after the handlers: a signal may arrive during this import

    run()


if __name__ == "__main__":
    main()
