"""The host's official SDK for Python."""

import json

from calls import Arguments, run
from cloudflare import APIStatusError, Cloudflare


def client(arguments: Arguments) -> Cloudflare:
    return Cloudflare(api_token=arguments.key, base_url=arguments.base_url, max_retries=0)


def unary(arguments: Arguments, prompt: str) -> object:
    result = client(arguments).ai.run(arguments.model, account_id=arguments.account, prompt=prompt)
    return {"text": result["response"], "usage": result["usage"]}


def stream(arguments: Arguments, prompt: str) -> object:
    ai = client(arguments).ai.with_streaming_response
    with ai.run(arguments.model, account_id=arguments.account, prompt=prompt, stream=True) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    events = [json.loads(event) for event in data]
    return {"pieces": [event["response"] for event in events], "usage": events[-1]["usage"]}


def error(exception: Exception) -> object:
    assert isinstance(exception, APIStatusError)
    return {"status": exception.status_code, "code": exception.errors[0].code, "message": exception.errors[0].message}


if __name__ == "__main__":
    run(unary, stream, error)
