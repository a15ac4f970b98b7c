"""A headless Chromium that runs JavaScript in a web page, over the pipes of the DevTools protocol."""

import asyncio
import contextlib
import itertools
import json
import os
import shlex
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]


class Page:
    """A page of a running Chromium."""

    def __init__(self, reader: asyncio.StreamReader, commands: int) -> None:
        self._reader = reader
        self._commands = commands
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: dict[str, str] = {}

    async def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        await self._call("Page.navigate", url=url)
        await self.run(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )

    async def run(self, script: str) -> Any:
        """Return the value of an expression, after the promise if it is one."""
        result = await self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, condition: str) -> None:
        """Wait until an expression is true, which is computed after each change of the document."""
        async with asyncio.timeout(60):
            await self.run(f"""new Promise(done => {{
                const check = () => ({condition}) && done();
                new MutationObserver(check).observe(
                    document, {{ subtree: true, childList: true, characterData: true, attributes: true }});
                check();
            }})""")

    async def read_replies(self) -> None:
        """Pass on the replies of the browser until its end."""
        while message := (await self._reader.readuntil(b"\0"))[:-1]:
            reply = json.loads(message)
            if "id" in reply:
                self._replies.pop(reply["id"]).set_result(reply)

    async def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        number = next(self._ids)
        self._replies[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": parameters} | self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        reply = await self._replies[number]
        assert "error" not in reply, reply
        result: dict[str, Any] = reply["result"]
        return result


@asynccontextmanager
async def running_chromium(folder: Path, hosts: dict[str, str]) -> AsyncIterator[Page]:
    """Run Chromium, in which each host and port of `hosts` stands for another one."""
    rules = ",".join(f"MAP {name} {address}" for name, address in hosts.items())
    command = ["chromium", *FLAGS, f"--user-data-dir={folder}", f"--host-resolver-rules={rules}", "about:blank"]
    child_reads, commands = os.pipe()
    replies, child_writes = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"exec {shlex.join(command)} 3<&{child_reads} 4>&{child_writes}"),
        pass_fds=(child_reads, child_writes),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(child_reads)
    os.close(child_writes)
    reader = asyncio.StreamReader(limit=2**24)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(replies, "rb")
    )
    page = Page(reader, commands)
    reading = asyncio.create_task(page.read_replies())
    try:
        yield page
    finally:
        reading.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its children
        await process.wait()
        await asyncio.wait([reading])
        transport.close()
        os.close(commands)
