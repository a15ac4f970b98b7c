"""`python -m llama2_server` is `llama2-server`."""

from llama2_server.cli.main import main

if __name__ == "__main__":
    main()
