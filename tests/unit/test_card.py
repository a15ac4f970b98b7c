"""The model card: parsed values, and rejection of invalid cards."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from tests.support.repository import ROOT

from llama2_server.card import SAMPLING_RANGES, CardError, Range, load_card, shipped_cards

CARD = "llama-2-7b-chat-fp16"


def test_7b_card_is_as_published() -> None:
    """The shipped 7B card has the published limits, quotas, prices and cache, and one slot."""
    card = load_card(CARD)
    assert card.name == "@cf/meta/llama-2-7b-chat-fp16"
    assert (card.context_length_limit, card.sequence_length_limit, card.default_max_tokens) == (3072, 2500, 256)
    assert card.neuron_costs == {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.3672")}
    assert card.max_concurrent_requests == 1
    assert card.constellation_config.infer_response_cache == "in_memory"
    assert card.constellation_config.max_requests_per_min.default == 5
    assert card.constellation_config.max_requests_per_min.accounts == {"32118455": 60, "50147400": 60}
    assert card.generation_config.dtype == "float16"
    assert (card.generation_config.temperature, card.generation_config.top_p) == (0.6, 0.9)
    assert json.loads(card.input_schema)["oneOf"][0]["properties"]["prompt"]["maxLength"] == 4096


@pytest.mark.parametrize("name", shipped_cards())
def test_every_shipped_card_loads(name: str) -> None:
    """Every card in the package is valid."""
    assert load_card(name).properties


def edited(tmp_path: Path, change: dict[str, object]) -> str:
    """Write a copy of the 7B card with some properties replaced; None removes a property."""
    folder = ROOT / "server/llama2_server/cards"
    document = next(yaml.safe_load_all((folder / f"{CARD}.yaml").read_text()))
    properties = {entry["property_id"]: entry["value"] for entry in document["model"]["properties"]}
    properties |= change
    document["model"]["properties"] = [
        {"property_id": key, "value": value} for key, value in properties.items() if value is not None
    ]
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


CONFIG = "max_requests_per_min: {default: 5}\nneurons: {metrics: []}\nmax_concurrent_requests: 1\n"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"context_length_limit": None}, "context_length_limit"),
        ({"context_length_limit": "many"}, "context_length_limit"),
        ({"sequence_length_limit": "0"}, "sequence_length_limit"),
        ({"constellation_config": None}, "constellation_config.max_requests_per_min"),
        ({"constellation_config": CONFIG + "max_concurent_requests: 2"}, "constellation_config.max_concurent_requests"),
        (
            {"constellation_config": CONFIG + "infer_response_cache: on_disk"},
            "constellation_config.infer_response_cache",
        ),
        ({"constellation_config": "["}, "while parsing"),
        ({"generation_config": "dtype: int4"}, "generation_config.dtype"),
        ({"generation_config": "temperature: 7"}, "temperature must be in [0, 5]"),
    ],
)
def test_invalid_key_is_named(tmp_path: Path, change: dict[str, object], key: str) -> None:
    """A card with a missing, unknown or invalid key is rejected with one line that names the key."""
    with pytest.raises(CardError) as rejected:
        load_card(edited(tmp_path, change))
    assert key in str(rejected.value)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize("text", ["", "just words", "- a list", "{model: 5}", "a: b: c", "[" * 500])
def test_other_file_is_rejected(tmp_path: Path, text: str) -> None:
    """A file that is not a card is rejected with one line."""
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(CardError) as rejected:
        load_card(str(path))
    assert "\n" not in str(rejected.value)


def test_unknown_card_lists_the_shipped_cards() -> None:
    """The error for an unknown name lists the shipped cards."""
    with pytest.raises(CardError, match=r"name a file or a shipped card: demo, llama-2-7b-chat-fp16$"):
        load_card("no-such-card")


def test_card_without_cache(tmp_path: Path) -> None:
    """A card without infer_response_cache turns the response cache off."""
    card = load_card(edited(tmp_path, {"constellation_config": CONFIG}))
    assert card.constellation_config.infer_response_cache is None


def test_published_card_gets_llama2_defaults(tmp_path: Path) -> None:
    """A published card has no generation_config property, and gets Llama-2's defaults."""
    config = load_card(edited(tmp_path, {"generation_config": None})).generation_config
    assert (config.dtype, config.temperature, config.top_p, config.system_prompt) == ("float16", 0.6, 0.9, None)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(0, 5), [0, 5], [-0.1, 5.1, float("nan"), float("inf")], "in [0, 5]"),
        (Range(0, 1, low_open=True), [1e-9, 1], [0, 1.01, float("nan")], "in (0, 1]"),
        (SAMPLING_RANGES["top_k"], [0, 10**9], [-1], "0 or more"),
    ],
)
def test_ranges(allowed: Range, inside: list[float], outside: list[float], text: str) -> None:
    """A range contains its ends unless they are open, never NaN, and formats itself as text."""
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == text
