"""LangChain's community integration of the host."""

from calls import Arguments, run
from langchain_community.llms.cloudflare_workersai import CloudflareWorkersAI


def llm(arguments: Arguments) -> CloudflareWorkersAI:
    return CloudflareWorkersAI(
        account_id=arguments.account,
        api_token=arguments.key,
        model=arguments.model,
        base_url=f"{arguments.base_url}/accounts",
    )


def unary(arguments: Arguments, prompt: str) -> object:
    return {"text": llm(arguments).invoke(prompt)}


def stream(arguments: Arguments, prompt: str) -> object:
    return {"pieces": list(llm(arguments).stream(prompt))}


def error(exception: Exception) -> object:
    return {"status": int(str(exception).removeprefix("Request failed with status "))}


if __name__ == "__main__":
    run(unary, stream, error)
