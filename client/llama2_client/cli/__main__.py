"""Run the `llama2` command with `python -m llama2_client.cli`."""

from llama2_client.cli.main import main

if __name__ == "__main__":
    main()
