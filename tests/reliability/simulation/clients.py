"""Clients: they obey the retry times, retry blindly, hang up, read slowly or never, and send invalid requests."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from tests.reliability.simulation.replica import Replica
from tests.reliability.simulation.steps import reply_tokens
from tests.reliability.simulation.world import World
from tests.support.simulated.grpc_server import EOF, InProcessCall

from llama2.v1 import account_pb2
from llama2.v1 import text_generation_pb2 as pb

TEXT = "/llama2.v1.TextGenerationService/"
KINDS = ("obeys", "obeys", "obeys", "blind", "hangs up", "reads slowly", "never reads", "short deadline", "odd")
OVERLOAD_KINDS = ("obeys",) * 9 + ("hangs up",)
PROMPTS = 24
MAX_ATTEMPTS = 12
RETURN_SECONDS = 0.9
ARRIVAL_SECONDS = 60.0
NEVER_READS_SECONDS = 40.0
CALL_SECONDS = 900.0
"""The deadline of patient calls: longer than the queue timeout and the longest fault."""

Status = dict[str, Any]


class Traffic:
    """All clients of a simulation; `stop` lets them finish their calls."""

    def __init__(self, world: World, replicas: Sequence[Replica], requests: int) -> None:
        self._world = world
        self._replicas = replicas
        self._left = requests
        self._numbers = itertools.count(1)
        self._new_prompts = itertools.count(1)

    @property
    def exhausted(self) -> bool:
        """Whether all requests have been sent."""
        return self._left <= 0

    async def run(self) -> None:
        """Run all clients until the requests are sent and answered."""
        shape, draw = self._world.shape, self._world.draw
        clients, kinds = [], OVERLOAD_KINDS if shape.overload else KINDS
        for index in range(shape.clients):
            # The first account has many more clients than the others.
            account = 0 if draw.random() < 0.3 else index % shape.accounts
            client = self._client(f"a{account}", kinds[index % len(kinds)])
            clients.append(asyncio.create_task(client, name=f"client {index}"))
        await asyncio.gather(*clients)

    async def _client(self, account: str, kind: str) -> None:
        draw = self._world.draw
        replica = draw.choice(self._replicas)
        if self._world.shape.overload:  # the servers first measure how long replies take
            await asyncio.sleep(draw.uniform(0, ARRIVAL_SECONDS))
        while not self.exhausted:
            await asyncio.sleep(draw.expovariate(1 / self._world.shape.pause_seconds))
            if kind == "odd":
                await self._odd_call(replica, account)
                continue
            request = self._request()
            told: Status = {}
            for _ in range(MAX_ATTEMPTS if kind in ("obeys", "blind") else 1):
                if self.exhausted:
                    break
                told = await self._generate(replica, account, kind, request, told)
                if told["code"] not in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
                    break
                if told["code"] == "UNAVAILABLE" and told.get("reason") in (None, "SHUTTING_DOWN"):
                    replica, told = draw.choice(self._replicas), {}
                wait = draw.uniform(0, 2)
                if kind == "obeys":
                    wait = (told.get("retry_after") or 0.5) + draw.uniform(0, RETURN_SECONDS)
                await asyncio.sleep(wait)

    def _request(self) -> pb.GenerateRequest:
        draw = self._world.draw
        number = draw.randrange(PROMPTS) if draw.random() < 0.3 else PROMPTS + next(self._new_prompts)
        request = pb.GenerateRequest(prompt=f"prompt {number}", raw=True)
        if draw.random() < 0.5:
            request.max_tokens = draw.choice([1, 3, 200])
        if draw.random() < 0.1:
            request.stop.append("never in a reply")
        request.no_cache = draw.random() < 0.2
        return request

    async def _generate(
        self, replica: Replica, account: str, kind: str, request: pb.GenerateRequest, told: Status
    ) -> Status:
        """Call once; return the status as the client sees it."""
        draw = self._world.draw
        inputs, outputs = self._expected(request)
        streams = kind in ("reads slowly", "never reads") or draw.random() < 0.5
        timeout = draw.uniform(0.1, 8) if kind == "short deadline" else CALL_SECONDS
        retry_of = told.get("call") if told.get("retry_after") is not None else None
        method = "GenerateStream" if streams else "Generate"
        attributes = {"expected": [inputs, outputs], "retry_of": retry_of, "timeout": timeout}
        call, number = self._start(replica, method, account, kind, request.SerializeToString(), timeout, attributes)
        if kind == "hangs up":
            asyncio.get_running_loop().call_later(draw.uniform(0, 3), call.cancel)
        if kind == "never reads":
            asyncio.get_running_loop().call_later(NEVER_READS_SECONDS, call.cancel)
            while call.code is None:
                await call._wait()
        text, completion = "", None
        while (message := await call.read()) is not EOF:
            part: Any = (pb.GenerateStreamResponse if streams else pb.GenerateResponse).FromString(message)
            text += part.response
            completion = part.completion if part.HasField("completion") else completion
            if kind == "reads slowly":
                await asyncio.sleep(draw.uniform(0, 2))
        return self._end(number, call, completion, text)

    async def _odd_call(self, replica: Replica, account: str) -> None:
        draw = self._world.draw
        kind = draw.choice(["invalid", "malformed", "keyless", "disabled", "count", "usage"])
        request: Any = pb.GenerateRequest(prompt="x", top_p=2)
        method = "Generate"
        if kind == "count":
            method, request = "CountTokens", pb.CountTokensRequest(prompt="x")
        if kind == "usage":
            method, request = "/llama2.v1.AccountService/GetUsage", account_pb2.GetUsageRequest()
        content = b"\xff\xff" if kind == "malformed" else request.SerializeToString()
        account = kind if kind in ("keyless", "disabled") else account
        call, number = self._start(replica, method, account, kind, content, CALL_SECONDS, {})
        while await call.read() is not EOF:
            pass
        self._end(number, call, None, "")

    def _start(
        self,
        replica: Replica,
        method: str,
        account: str,
        kind: str,
        content: bytes,
        timeout: float,
        attributes: dict[str, Any],
    ) -> tuple[InProcessCall, int]:
        self._left -= 1
        number = next(self._numbers)
        process = "" if replica.process is None else replica.process.name
        self._world.history.add(
            "call", call=number, account=account, kind=kind, method=method, process=process, **attributes
        )
        path = method if method.startswith("/") else TEXT + method
        metadata = (*self._world.keys.header(account), ("call", str(number)))
        return replica.call(path, content, metadata, timeout), number

    def _end(self, number: int, call: InProcessCall, completion: Any, text: str) -> Status:
        assert call.code is not None
        status: Status = {"call": number, "code": call.code.name, **_details(call)}
        if completion is not None:
            usage = completion.usage
            status |= {
                "id": completion.request_id,
                "usage": [usage.input_tokens, usage.output_tokens],
                "neurons": usage.neurons,
                "cached": completion.cached,
                "finish_reason": pb.FinishReason.Name(completion.finish_reason).removeprefix("FINISH_REASON_"),
                "text": len(text),
            }
        self._world.history.add("end", **status)
        return status

    def _expected(self, request: pb.GenerateRequest) -> tuple[int, int]:
        ids = self._world.tokenizer.encode_raw(request.prompt)
        limit = request.max_tokens if request.HasField("max_tokens") else self._world.card.default_max_tokens
        return len(ids), min(reply_tokens(ids), limit)


def _details(call: InProcessCall) -> Status:
    """Return reason, retry time and request id of an error."""
    content = call.trailers.get("grpc-status-details-bin")
    if call.code is grpc.StatusCode.OK or not isinstance(content, bytes):
        return {} if call.code is grpc.StatusCode.OK else {"message": call.message}
    found: Status = {}
    for packed in status_pb2.Status.FromString(content).details:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            packed.Unpack(info)
            found["reason"] = info.reason
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            found["retry_after"] = retry.retry_delay.ToTimedelta().total_seconds()
        elif packed.Is(error_details_pb2.RequestInfo.DESCRIPTOR):
            request = error_details_pb2.RequestInfo()
            packed.Unpack(request)
            found["id"] = request.request_id
    if call.message.startswith("the request queue is full, and an account"):
        found["displaced"] = True
    return found
