"""litellm, in a version that calls `/ai/run/`."""

import json
import os

from calls import Arguments, run

# Otherwise its import downloads the prices of models.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm


def complete(arguments: Arguments, prompt: str, **options: object) -> object:
    return litellm.completion(
        f"cloudflare/{arguments.model}",
        [{"role": "user", "content": prompt}],
        api_base=f"{arguments.base_url}/accounts/{arguments.account}/ai/run/",
        api_key=arguments.key,
        num_retries=0,
        **options,
    )


def unary(arguments: Arguments, prompt: str) -> object:
    return {"text": complete(arguments, prompt).choices[0].message.content}


def stream(arguments: Arguments, prompt: str) -> object:
    chunks = list(complete(arguments, prompt, stream=True))
    return {"pieces": [chunk.choices[0].delta.content or "" for chunk in chunks]}


def error(exception: Exception) -> object:
    body = json.loads("{" + str(exception).partition("{")[2].rpartition("}")[0] + "}")
    return body["errors"][0]


if __name__ == "__main__":
    run(unary, stream, error)
