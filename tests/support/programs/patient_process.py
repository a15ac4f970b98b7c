"""A server process for a busy machine: Redis has more time for its answers, and the quota window outlasts the test."""

import functools

from llama2_server.admission import quota_windows
from llama2_server.admission.quota import Quota
from llama2_server.cli.main import main
from llama2_server.generation import response_cache
from llama2_server.lifecycle import stores

if __name__ == "__main__":
    quota_windows.STORE_TIMEOUT_SECONDS = 30
    response_cache.STORE_TIMEOUT_SECONDS = 30
    stores.Quota = functools.partial(Quota, window_seconds=3600)  # type: ignore[attr-defined, assignment]
    main()
