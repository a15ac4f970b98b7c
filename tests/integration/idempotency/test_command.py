"""`llama2 generate` and `llama2 chat` survive a restart of a real server in the middle of a reply."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.client.cli.command import COMMAND, Result, environment, run
from tests.integration.service.conftest import records
from tests.support.forks import ForkedServer, Forks
from tests.support.processes import card_file, free_port

# A start of the command and of a server takes seconds on a busy machine.
pytestmark = pytest.mark.timeout(300)
STORY = "Tell me a story about a fox who lives by the sea."
OPTIONS = ("--seed", "7", "--max-tokens", "60")
STEP_SECONDS = 0.05
"""Delay of each step of the server that ends, so that the reply takes three seconds."""
QUOTA = 2
"""One for the cut reply, one for the reply without a cut; a server that restarts counts again."""
Starter = Callable[..., ForkedServer]
COMMANDS = {"generate": (("generate", STORY), b""), "chat": (("chat",), f"{STORY}\n".encode())}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Run the process that forks servers."""
    with Forks.running(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def start(forks: Forks, tmp_path: Path) -> Starter:
    """Return a function that starts a server, always on the same port and data directory."""
    card = card_file(tmp_path, infer_response_cache=None, max_requests_per_min={"default": QUOTA, "accounts": {}})
    listen = f"127.0.0.1:{free_port()}"

    def start(*flags: str, step_seconds: float = 0) -> ForkedServer:
        flags = ("--card", str(card), "--weights", "demo", "--listen", listen, *flags)
        return forks.start(tmp_path / "data", *flags, step_seconds=step_seconds)

    return start


@asynccontextmanager
async def command_in_reply(
    address: str, arguments: tuple[str, ...], stdin: bytes
) -> AsyncIterator[Callable[[], Awaitable[Result]]]:
    """Run `llama2` until it has printed a part of its reply; yield a function that waits for its end."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *arguments), env=environment(address), stdin=-1, stdout=-1, stderr=-1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(stdin)
        process.stdin.close()
        begin = await process.stdout.read(1)
        begin += await process.stdout.read(65536)

        async def finish() -> Result:
            out, err = await process.communicate()
            return Result(process.returncode, (begin + out).decode(), err.decode())

        yield finish
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_reply_survives_a_restart(start: Starter, tmp_path: Path, name: str, number: signal.Signals) -> None:
    """The output equals that of a reply without a cut; there is one record, with its price."""
    arguments, stdin = COMMANDS[name]
    server = await asyncio.to_thread(start, "--shutdown-grace-seconds", "0", step_seconds=STEP_SECONDS)
    async with command_in_reply(server.address, (*arguments, *OPTIONS), stdin) as finish:
        os.kill(server.pid, number)
        code = await asyncio.to_thread(server.wait)
        assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
        assert not any(record["outcome"] == "MAX_TOKENS" for record in records(tmp_path / "data"))
        again = await asyncio.to_thread(start)
        result = await finish()
    whole = await run(server.address, *arguments, *OPTIONS, stdin=stdin)
    await asyncio.to_thread(again.stop)
    assert (result.code, whole.code) == (0, 0)
    assert result.out == whole.out
    assert len(result.out) > 100
    first, second = records(tmp_path / "data")
    for field in ("outcome", "input_tokens", "output_tokens", "neurons"):
        assert first[field] == second[field]
