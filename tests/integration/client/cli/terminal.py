"""The `llama2` command in a pseudo-terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import sys
from collections.abc import AsyncIterator

from tests.integration.client.cli.command import environment


class Terminal:
    """A command with its own controlling terminal, so that Ctrl-C sends it a signal."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._output = ""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, address: str, *arguments: str, term: str = "dumb"
    ) -> AsyncIterator[tuple[Terminal, asyncio.subprocess.Process]]:
        """Start `llama2` with these arguments in a new terminal of this type."""
        # The first terminal that a session leader opens becomes its controlling terminal.
        start = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR));"
        start += "from llama2_client.cli.__main__ import main; main()"
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", start, *arguments),
            env=environment(address, TERM=term),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        terminal = cls(master)
        try:
            yield terminal, process
        finally:
            asyncio.get_running_loop().remove_reader(master)
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(master)

    def type(self, text: str) -> None:
        """Send this text as keyboard input."""
        os.write(self._master, text.encode())

    async def press(self, keys: str, text: str) -> None:
        """Send these keys until the terminal shows this text.

        Readline can miss a signal between its prompt and its wait for input; it handles the signal at the next key.
        """
        for _ in range(15):
            self.type(keys)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.until(text), 1)
                return
        raise AssertionError(f"the terminal does not show {text!r}, but {self._output!r}")

    async def until(self, text: str) -> str:
        """Wait until the terminal shows this text. Return and discard the output up to its end."""
        while text not in self._output:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), 15)
            except TimeoutError:
                raise AssertionError(f"the terminal does not show {text!r}, but {self._output!r}") from None
        before, _, self._output = self._output.partition(text)
        return before + text

    def _read(self) -> None:
        try:
            self._output += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the command has exited
            asyncio.get_running_loop().remove_reader(self._master)
        self._changed.set()
