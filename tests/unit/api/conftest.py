"""A validator with a small context."""

import pytest
from tests.unit.api.requests import CARD

from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.card import ModelCard
from llama2_server.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_card() -> ModelCard:
    """A card with a context of 60 tokens, of which at most 40 are generated."""
    return CARD.model_copy(update={"context_length_limit": 60, "sequence_length_limit": 40, "default_max_tokens": 30})


@pytest.fixture(scope="session")
def validator(small_card: ModelCard, demo_tokenizer: Tokenizer) -> RequestValidator:
    return RequestValidator(small_card, demo_tokenizer)
