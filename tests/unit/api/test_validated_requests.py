"""The prompts, parameters and token counts that validation returns."""

from collections.abc import Callable

import pytest
from tests.unit.api.requests import user

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.card import ModelCard
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import InvalidRequest


@pytest.mark.parametrize(("streaming", "stream"), [(False, False), (True, True), (False, None), (True, None)])
def test_stream_is_accepted_if_unset_or_consistent(
    validator: RequestValidator, streaming: bool, stream: bool | None
) -> None:
    """Both RPCs accept `stream` if it is unset or agrees with the RPC."""
    request = pb.GenerateRequest(prompt="a")
    if stream is not None:
        request.stream = stream
    validator.validate_generate(request, streaming=streaming)


def test_unset_values_come_from_the_card(validator: RequestValidator) -> None:
    """Unset sampling parameters and max_tokens have the card's values; unset seeds differ."""
    _, first = validator.validate_generate(pb.GenerateRequest(prompt="a"), streaming=False)
    _, second = validator.validate_generate(pb.GenerateRequest(prompt="a"), streaming=False)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.6, 0.9, 0, 1.0)
    assert (first.max_tokens, first.stop) == (30, ())
    assert first.seed != second.seed


def test_set_values_take_precedence(validator: RequestValidator) -> None:
    """Set values, zeros included, are used without a change."""
    request = pb.GenerateRequest(
        prompt="a", temperature=0, top_p=1, top_k=3, seed=2**64 - 1, max_tokens=7, stop=["x"], repetition_penalty=1.5
    )
    _, params = validator.validate_generate(request, streaming=False)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0, 1, 3, 2**64 - 1)
    assert (params.max_tokens, params.stop, params.repetition_penalty) == (7, ("x",), 1.5)


def test_default_max_tokens_is_reduced_to_fit_the_context(
    validator: RequestValidator, demo_tokenizer: Tokenizer
) -> None:
    """A prompt that fits into the context is never rejected because of the default max_tokens."""
    for words in range(1, 45):
        request = pb.GenerateRequest(prompt="a " * words, raw=True)
        tokens = len(demo_tokenizer.encode_raw(request.prompt))
        if tokens < 60:
            _, params = validator.validate_generate(request, streaming=False)
            assert params.max_tokens == min(30, 60 - tokens)


def test_prompt_is_one_user_message_after_the_system_prompt_of_the_card(
    small_card: ModelCard, demo_tokenizer: Tokenizer
) -> None:
    """`prompt` and the equivalent conversation have the same tokens."""
    config = small_card.generation_config.model_copy(update={"system_prompt": "Be kind."})
    with_system = RequestValidator(small_card.model_copy(update={"generation_config": config}), demo_tokenizer)
    prompt, _ = with_system.validate_generate(pb.GenerateRequest(prompt="Hi"), streaming=False)
    chat = [pb.ChatMessage(role="system", content="Be kind."), user("Hi")]
    messages, _ = with_system.validate_generate(pb.GenerateRequest(messages=chat), streaming=False)
    assert prompt == messages
    assert demo_tokenizer.decode(prompt.token_ids) == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]"


def test_raw_text_is_not_changed(validator: RequestValidator, demo_tokenizer: Tokenizer) -> None:
    """With `raw`, the tokens are the beginning-of-sequence token and the text, tags included."""
    prompt, _ = validator.validate_generate(pb.GenerateRequest(prompt=" [INST] <s> x", raw=True), streaming=False)
    assert prompt.raw
    assert prompt.token_ids[0] == demo_tokenizer.bos_id
    assert demo_tokenizer.bos_id not in prompt.token_ids[1:]
    assert demo_tokenizer.decode(prompt.token_ids) == " [INST] <s> x"


def test_count_tokens_agrees_with_generate(validator: RequestValidator, demo_tokenizer: Tokenizer) -> None:
    """CountTokens returns the number of tokens of Generate's prompt, and the largest max_tokens that fits."""
    prompt, _ = validator.validate_generate(pb.GenerateRequest(prompt="Hello there"), streaming=False)
    counts = validator.validate_count_tokens(pb.CountTokensRequest(prompt="Hello there"))
    assert counts[:2] == (len(prompt.token_ids), min(40, 60 - len(prompt.token_ids)))


@pytest.mark.parametrize("max_tokens", [None, 1, 40, 0, 41, 50, -1, 10**6])
@pytest.mark.parametrize("prompt", ["Hello there", "many words " * 8])
def test_the_priced_tokens_are_those_of_generate(validator: RequestValidator, prompt: str, max_tokens: int) -> None:
    """CountTokens prices the `max_tokens` that Generate would use, and rejects what Generate rejects, in its words."""
    generate = pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens)
    count = pb.CountTokensRequest(prompt=prompt, max_tokens=max_tokens)

    def outcome(validate: Callable[[], int]) -> object:
        try:
            return validate()
        except InvalidRequest as error:
            return error.violations

    expected = outcome(lambda: validator.validate_generate(generate, streaming=False)[1].max_tokens)
    assert outcome(lambda: validator.validate_count_tokens(count).priced_output_tokens) == expected


def test_count_tokens_counts_prompts_beyond_the_context(validator: RequestValidator) -> None:
    """A prompt that does not fit is counted, and no output tokens fit."""
    counts = validator.validate_count_tokens(pb.CountTokensRequest(prompt="many words " * 30, max_tokens=40))
    assert counts.input_tokens > 60
    assert counts[1:] == (0, 0)


def test_count_tokens_rejects_extremely_long_prompts(validator: RequestValidator) -> None:
    """CountTokens also rejects a prompt whose size alone shows that it exceeds the context."""
    for request in (pb.CountTokensRequest(prompt="word " * 800), pb.CountTokensRequest(messages=[user("a")] * 61)):
        with pytest.raises(InvalidRequest, match="at least"):
            validator.validate_count_tokens(request)
