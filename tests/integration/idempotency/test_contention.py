"""A generation whose client has left gives its slot to any other call, as after a cancelled call without a key."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.client.cli.command import COMMAND, environment
from tests.integration.service.conftest import records
from tests.support.service import Service, ServiceMaker, generate, until

from llama2.v1 import text_generation_pb2 as pb

ENDLESS = "Once upon a time, there was no end. "


@asynccontextmanager
async def running_command(service: Service, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `llama2` until it has printed the first token of its reply; the model is in its second step."""
    service.model.gate()
    service.model.allow(1)
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *arguments), env=environment(service.address), stdin=asyncio.subprocess.PIPE, stdout=-1, stderr=-1
    )
    try:
        if "chat" in arguments:
            assert process.stdin is not None
            process.stdin.write(b"a story\n")
        assert process.stdout is not None
        async with asyncio.timeout(60):
            await process.stdout.readexactly(1)
        await service.wait_until_in_step()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("arguments", [["generate", "a story"], ["--no-resume", "generate", "a story"], ["chat"]])
async def test_ctrl_c_frees_the_slot_for_a_waiting_call(
    serve_scripted: ServiceMaker, tmp_path: Path, arguments: list[str]
) -> None:
    """The call that waits gets the slot after the step in progress; the tokens after Ctrl-C are not billed."""
    async with serve_scripted(ENDLESS, ends=False) as service, running_command(service, *arguments) as process:
        waiting = asyncio.ensure_future(generate(service, "waits", 1))
        await service.wait_until_queued(1)
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 130
        await until(lambda: service.finished_calls("CANCELLED") == 1)
        service.model.allow(2)  # the step in progress, and the prefill of the call that waits
        await until(lambda: service.model.prefills == 2)
        service.model.open_gate()
        await waiting
    stopped, other = sorted(records(tmp_path), key=lambda record: record["outcome"])
    assert (stopped["outcome"], other["outcome"]) == ("CANCELLED", "MAX_TOKENS")
    assert stopped["output_tokens"] in (1, 2)  # the token of the step in progress, without a key


async def test_a_call_after_ctrl_c_gets_the_slot(serve_scripted: ServiceMaker) -> None:
    """A call that comes later is not rejected, also by a queue without space; it waits for one step."""
    async with serve_scripted(ENDLESS, ends=False, max_queue_size=0) as service:
        async with running_command(service, "generate", "a story") as process:
            process.send_signal(signal.SIGINT)
            await process.communicate()
        await until(lambda: service.finished_calls("CANCELLED") == 1)
        assert service.metrics.registry.get_sample_value("llama2_requests_running") == 1
        later = asyncio.ensure_future(generate(service, "comes later", 1))
        await service.wait_until_queued(1)
        service.model.allow(2)  # the step in progress, and the prefill of the call that waits
        await until(lambda: service.model.prefills == 2)
        service.model.open_gate()
        assert (await later).completion.finish_reason == pb.FINISH_REASON_MAX_TOKENS
