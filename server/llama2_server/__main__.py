"""Run `llama2-server` with `python -m llama2_server`."""

from llama2_server.cli.main import main

if __name__ == "__main__":
    main()
