"""The web page of `examples/clients/browser`, in a headless Chromium; tests use it like the other client programs."""

import asyncio
import json
import shlex
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.integration.examples.clients.chromium import Page, running_chromium
from tests.integration.examples.clients.client_program import ClientProgram, Running
from tests.support.processes import environment, free_port
from tests.support.servers.envoy_server import running_envoy

ADDRESS = "localhost:3000"  # the page that the example's Envoy allows
IDLE = "!document.getElementById('send').disabled"


class RunningPage:
    """An open page, and what it has printed."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._position = 0  # in the output
        self._tasks: list[asyncio.Task[None]] = []

    async def fill(self, name: str, value: str) -> None:
        """Type text into an input."""
        await self._page.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")

    def send(self, *lines: str) -> None:
        """Type lines; each is sent after the reply to the previous one."""
        self._tasks.append(asyncio.create_task(self._send(lines)))

    async def wait_for_output(self, text: str) -> None:
        """Wait until the page has printed a text."""
        await self._page.wait_for(f"{_printed('reply')}.indexOf({json.dumps(text)}, {self._position}) >= 0")
        self._position = (await self._output()).index(text, self._position) + len(text)

    def interrupt(self) -> None:
        """Click "Stop"."""
        self._tasks.append(asyncio.create_task(self._page.run("document.getElementById('stop').click()")))

    async def finish(self) -> tuple[str, str]:
        """Wait for all replies, and return the rest of the output, and all errors."""
        await asyncio.gather(*self._tasks)
        await self._page.wait_for(IDLE)
        return (await self._output())[self._position :], await self._page.run(_printed("error"))

    async def _send(self, lines: tuple[str, ...]) -> None:
        for line in lines:
            await self._page.wait_for(IDLE)
            await self.fill("message", line)
            await self._page.run("document.getElementById('send').click()")

    async def _output(self) -> str:
        output: str = await self._page.run(_printed("reply"))
        return output


def _printed(kind: str) -> str:
    return f"[...document.querySelectorAll('.{kind}')].map(span => span.textContent).join('')"


class WebPage(ClientProgram):
    """The page, which was built in a copy of this checkout."""

    attempts = None  # Envoy repeats the call, and does not count

    @asynccontextmanager
    async def running(self, address: str, *arguments: str, **variables: str) -> AsyncIterator[Running]:
        """Serve the page with the README's last command, and open it; only ports differ from the README."""
        port = free_port()
        serve = shlex.split(self.commands[-1])
        serve[serve.index(ADDRESS.partition(":")[2])] = str(port)
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            envoy = await stack.enter_async_context(running_envoy(folder, address))
            server = await asyncio.create_subprocess_exec(
                *serve,
                cwd=self.checkout / self.commands[0].removeprefix("cd "),
                env=environment(PYTHONUNBUFFERED="1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            stack.push_async_callback(server.wait)
            stack.callback(server.kill)
            assert server.stdout is not None
            await server.stdout.readline()  # it listens
            hosts = {ADDRESS: f"127.0.0.1:{port}", "127.0.0.1:8080": envoy.address}
            page = await stack.enter_async_context(running_chromium(folder / "profile", hosts))
            await page.open(f"http://{ADDRESS}/")
            running = RunningPage(page)
            for name, value in (
                ("system", shlex.split(" ".join(arguments))),
                ("key", [variables.get("LLAMA2_API_KEY", "")]),
            ):
                await running.fill(name, "".join(value))
            yield running
