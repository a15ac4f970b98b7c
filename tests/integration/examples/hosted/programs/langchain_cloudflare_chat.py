"""The host's own LangChain integration."""

import httpx
from calls import Arguments, run
from langchain_cloudflare import ChatCloudflareWorkersAI


def chat(arguments: Arguments) -> ChatCloudflareWorkersAI:
    return ChatCloudflareWorkersAI(
        account_id=arguments.account, api_token=arguments.key, model=arguments.model, base_url=arguments.base_url
    )


def unary(arguments: Arguments, prompt: str) -> object:
    message = chat(arguments).invoke(prompt)
    return {"text": message.content, "usage": message.response_metadata["token_usage"]}


def stream(arguments: Arguments, prompt: str) -> object:
    return {"pieces": [chunk.content for chunk in chat(arguments).stream(prompt)]}


def error(exception: Exception) -> object:
    assert isinstance(exception, httpx.HTTPStatusError)
    (first, *_) = exception.response.json()["errors"]
    return {"status": exception.response.status_code} | first


if __name__ == "__main__":
    run(unary, stream, error)
