"""Typed model card: one YAML file that defines the whole behavior of the service."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from llama2_server.configuration_error import ConfigurationError


class CardError(ConfigurationError):
    """The card is not valid; the message is one line that names the card and the key."""


@dataclass(frozen=True, slots=True)
class Range:
    """Valid values of a sampling parameter, for the card's defaults and for requests."""

    low: float
    high: float
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and value <= self.high  # False for NaN

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.low:g} or more"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"


SAMPLING_RANGES: Mapping[str, Range] = {
    "temperature": Range(0, 5),
    "top_p": Range(0, 1, low_open=True),
    "top_k": Range(0, math.inf),
    "repetition_penalty": Range(0, 2, low_open=True),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(_Part):
    """The kind of work that the model does, such as text generation; shown to clients, not used."""

    id: str
    name: str
    description: str


class Property(_Part):
    """One property of the card, as text."""

    property_id: str
    value: str


class RequestsPerMinute(_Part):
    """Maximum number of requests in any 60 seconds: the default, and overrides by account id."""

    default: PositiveInt
    accounts: dict[Annotated[str, Field(coerce_numbers_to_str=True)], PositiveInt] = {}


class NeuronMetric(_Part):
    """Price of one input token or one output token, in neurons."""

    name: Literal["input_tokens", "output_tokens"]
    neuron_cost: Annotated[Decimal, Field(ge=0)]


class Neurons(_Part):
    """The prices of input and output tokens; other metrics are not allowed."""

    metrics: tuple[NeuronMetric, ...]


class ConstellationConfig(_Part):
    """Quotas, prices and limits of the service: the value of the property `constellation_config`."""

    infer_response_cache: Literal["in_memory"] | None = None
    max_requests_per_min: RequestsPerMinute
    neurons: Neurons
    max_concurrent_requests: PositiveInt


class GenerationConfig(_Part):
    """Defaults of a request's fields: the value of the property `generation_config`, else Llama-2's defaults."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    system_prompt: str | None = None

    @model_validator(mode="after")
    def _within_ranges(self) -> "GenerationConfig":
        for name, allowed in SAMPLING_RANGES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")
        return self


class ModelCard(_Part):
    """The active card; fields beyond the published keys are parsed from `properties`."""

    id: str
    name: str
    display_name: str
    description: str
    task: Task
    tags: tuple[str, ...]
    properties: tuple[Property, ...]
    context_length_limit: PositiveInt
    sequence_length_limit: PositiveInt
    constellation_config: ConstellationConfig
    generation_config: GenerationConfig
    input_schema: str
    output_schema: str
    default_max_tokens: PositiveInt

    @property
    def neuron_costs(self) -> Mapping[str, Decimal]:
        """Neurons per token, by metric."""
        return {metric.name: metric.neuron_cost for metric in self.constellation_config.neurons.metrics}

    @property
    def text_digest(self) -> str:
        """SHA-256 of the values that decide a text: limits and defaults, but no prices, quotas or descriptions."""
        limits = [self.context_length_limit, self.sequence_length_limit, self.default_max_tokens]
        defaults = self.generation_config.model_dump(mode="json")
        return hashlib.sha256(json.dumps([limits, defaults], sort_keys=True).encode()).hexdigest()

    @property
    def max_concurrent_requests(self) -> int:
        """Maximum number of requests that generate at the same time."""
        return self.constellation_config.max_concurrent_requests


def shipped_cards() -> list[str]:
    """Return the names of the cards that ship with the package."""
    folder = resources.files("llama2_server") / "cards"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_card(card: str) -> ModelCard:
    """Read a card from a file, or a shipped card by its name.

    Raises:
        CardError: the card does not exist or is not YAML, or a key is missing, unknown or not valid.
    """
    shipped = resources.files("llama2_server") / "cards" / f"{card}.yaml"
    path = Path(card)
    try:
        text = (shipped if card in shipped_cards() else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        names = ", ".join(shipped_cards())
        raise CardError(f"--card {card}: cannot be read ({reason}); name a file or a shipped card: {names}") from error
    try:
        return parse_card(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CardError(f"--card {card}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CardError(f"--card {card}: {' '.join(str(error).split())}") from error


def parse_card(text: str) -> ModelCard:
    """Parse a card's YAML (front matter or plain).

    Raises:
        ValueError: the text is not a card; a pydantic.ValidationError, which is a ValueError, names the key.
        yaml.YAMLError: the text is not YAML.
    """
    document = _mapping("the card", next((part for part in yaml.safe_load_all(text) if part is not None), None))
    model = _mapping("model", document.get("model"))
    schemas = _mapping("json_schema", document.get("json_schema"))
    properties = _properties(model.get("properties"))
    return ModelCard.model_validate(
        {
            "id": model.get("id"),
            "name": model.get("name"),
            "display_name": document.get("model_display_name", model.get("name")),
            "description": model.get("description", ""),
            "task": model.get("task"),
            "tags": model.get("tags", ()),
            "properties": [{"property_id": key, "value": value} for key, value in properties.items()],
            "context_length_limit": properties.get("context_length_limit"),
            "sequence_length_limit": properties.get("sequence_length_limit"),
            "constellation_config": _nested_yaml(properties, "constellation_config"),
            "generation_config": _nested_yaml(properties, "generation_config"),
            "input_schema": schemas.get("input"),
            "output_schema": schemas.get("output"),
            "default_max_tokens": _default_max_tokens(schemas.get("input")),
        }
    )


def _mapping(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: must be a mapping, got {'nothing' if value is None else type(value).__name__}")
    return value


def _properties(entries: object) -> dict[str, str]:
    if not isinstance(entries, list):
        raise ValueError("model.properties: must be a list of mappings with property_id and value")
    parsed: dict[str, str] = {}
    for entry in entries:
        pair = _mapping("model.properties entry", entry)
        key = str(pair.get("property_id"))
        if key in parsed:
            raise ValueError(f"model.properties: duplicate key {key}; keep one entry")
        parsed[key] = str(pair.get("value", ""))
    return parsed


def _nested_yaml(properties: Mapping[str, str], key: str) -> dict[str, Any]:
    value = yaml.safe_load(properties.get(key, ""))
    return {} if value is None else _mapping(key, value)


def _default_max_tokens(input_schema: object) -> int:
    """Check the schema, and return its default for `max_tokens`, from the top level or from a `oneOf` branch."""
    try:
        schema = json.loads(str(input_schema))
        jsonschema.Draft202012Validator.check_schema(schema)
    except (json.JSONDecodeError, jsonschema.SchemaError, RecursionError) as error:
        raise ValueError(f"json_schema.input: not a valid JSON Schema ({str(error).splitlines()[0]})") from error
    branches = [schema, *schema.get("oneOf", [])] if isinstance(schema, dict) else []
    defaults = {branch.get("properties", {}).get("max_tokens", {}).get("default") for branch in branches} - {None}
    if len(defaults) != 1:
        raise ValueError(f"json_schema.input: must have one default for max_tokens, has {len(defaults)}")
    return int(defaults.pop())
