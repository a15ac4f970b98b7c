"""Generate JSON bodies: valid ones, invalid ones, and ones at the borders. A number always gives the same body."""

import copy
import random
from collections.abc import Callable
from typing import Any

from conformance.equivalence.oracle import CAMEL_CASE, TAGS, TAKEN_KEY

MAX_TEXT = 4096
WORDS = (
    *("one", "two", "three", "seven", "hundred", "count", "poet", "coin", "snow", "hello", "world"),
    *("é", "ж", "你", "😀", "e\u0301", "<s>", "</s>", "[inst]"),
)
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, 5, -1, 1.5, "", "hot", "x", [], {}, [1], ["x"], [None], {"a": 1})
MAX_TOKENS: tuple[Any, ...] = (
    *(0, -1, -(2**31), -(2**31) - 1, 0.0, 1, 1.0, 2, 1.5, 256.0, 2499, 2500, 2501, 3071, 3072, 3073, 2**31 - 1),
    *(2**31, 2**63, 10**30, "1", "5", "0", "-1", "2501", "2147483648", "abc", "", "1.5", True, None, [], {}, [1]),
)
FIELDS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.0, 5, 5.0, "0.5", -0.1, 5.01, "hot", [], {}, "NaN", "Infinity", None),
    "top_p": (1, 1.0, 0.01, "0.5", 0, 0.0, 1.01, -1, "high", [0.5], {}, None),
    "top_k": (0, 1, 5.0, "5", 2**31 - 1, -1, 2**31, 1.5, "few", False, [], {}, None),
    "seed": (0, 7, "7", 2**64 - 1, str(2**64 - 1), -1, 2**64, 1.5, "x", True, [], {}, None),
    "repetition_penalty": (2, 2.0, 0.01, "1", 0, 2.01, -1, "x", [], {}, None),
    "frequency_penalty": (-2, 2, 0, "1", -2.01, 2.01, "x", [], {}, None),
    "presence_penalty": (-2, 2, 0, "1", -2.01, 2.01, "x", [], {}, None),
    "stop": ([], ["x"], ["x"] * 4, ["x" * 256], ["x"] * 5, [""], ["x" * 257], "x", [1], [None], {}, 5, None),
    "no_cache": (True, False, "true", 1, 0, [], {}, None),
    "idempotency_key": ("", "k" * 129, "a\nb", "\x7f", 5, True, [], {}, None),
    "resume_after_characters": (0, 1, 5.0, "7", 2**31 - 1, -1, 2**31, 1.5, "x", True, [], {}, None),
    "maxTokens": (1, 0, -1, 2**31, "abc", 1.5, True, [], {}, None),
    "topP": (1, 0.5, 0, 2, "x", [], None),
    "topK": (0, 5, -1, 1.5, [], None),
    "noCache": (True, "yes", 1, None),
}
"""Values of the fields that the card does not define, under both names that protobuf's JSON form reads.

No boolean for a number with a fraction: protobuf's parser in Python reads it as a number, unlike other parsers.
"""
FRACTIONS = {"temperature", "top_p", "topP", "repetition_penalty", "frequency_penalty", "presence_penalty"}
OTHER_NAMES = CAMEL_CASE | {name: camel for camel, name in CAMEL_CASE.items()}

Body = dict[str, Any]
Change = Callable[[random.Random, Body], Any]


def make_body(seed: int, number: int) -> Any:
    """Return a body: a valid one with none, one or several changes, most of which make it invalid."""
    chance = random.Random(f"{seed}/{number}")
    body: Any = _valid(chance)
    for _ in range(chance.choices((0, 1, 2, 3), (3, 12, 4, 1))[0]):
        if isinstance(body, dict):
            changed = chance.choice(CHANGES)(chance, body)
            body = body if changed is None else changed
    return body


def _pick(chance: random.Random, values: tuple[Any, ...]) -> Any:
    """Return a copy of one of the values, because later changes may write into it."""
    return copy.deepcopy(chance.choice(values))


def _valid(chance: random.Random) -> Body:
    body: Body = {"prompt": _text(chance)} if chance.random() < 0.5 else {"messages": _chat(chance)}
    if "prompt" in body and chance.random() < 0.3:
        body["raw"] = chance.random() < 0.5
    if chance.random() < 0.3:
        body["stream"] = chance.random() < 0.5
    if chance.random() < 0.95:
        body["max_tokens"] = 1
    if chance.random() < 0.1:
        body["unknown"] = _pick(chance, VALUES)
    return body


def _text(chance: random.Random) -> str:
    if chance.random() < 0.02:
        return _long(chance)
    return " ".join(chance.choices(WORDS, k=chance.randrange(4)))


def _long(chance: random.Random) -> str:
    """Return a text of about the largest number of characters, with few or with many tokens."""
    unit, length = chance.choice((" two", " hundred", "a", "😀", "e\u0301")), MAX_TEXT + chance.randrange(-1, 2)
    return (unit * length)[:length]


def _chat(chance: random.Random) -> list[Body]:
    roles = ["system"] * chance.randrange(2) + ["user", "assistant"] * chance.choice((0, 0, 1, 2)) + ["user"]
    return [{"role": role, "content": _text(chance)} for role in roles]


def _messages(body: Body) -> list[Body]:
    """Return the messages of a body that are objects."""
    messages = body.get("messages")
    return [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def _place(chance: random.Random, body: Body, values: tuple[Any, ...], key: str) -> None:
    """Set `key` in the body or in one of its messages."""
    holders = _messages(body)
    if key in ("role", "content") and holders:
        chance.choice(holders)[key] = _pick(chance, values)
    elif key == "content":
        body["prompt"] = _pick(chance, values)


def _other_form(chance: random.Random, body: Body) -> None:
    """Add the other of prompt and messages."""
    values = (_text(chance), *VALUES) if "messages" in body else (_chat(chance), [], *VALUES)
    body["prompt" if "messages" in body else "messages"] = _pick(chance, values)


def _raw(chance: random.Random, body: Body) -> None:
    body["raw"] = chance.choice((True, True, True, False, "yes", "true", "no", "0", 1, 0, [], {}, None))


def _bad_role(chance: random.Random, body: Body) -> None:
    _place(chance, body, ("tool", "User", "", "system ", "function", "USER", *VALUES), "role")


def _order(chance: random.Random, body: Body) -> None:
    """Change the order of the messages."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return
    match chance.randrange(4):
        case 0:
            messages.pop()
        case 1:
            messages.append(dict(messages[0]) if isinstance(messages[0], dict) else messages[0])
        case 2:
            chance.shuffle(messages)
        case _:
            messages.append({"role": chance.choice(("user", "assistant", "system")), "content": _text(chance)})


def _tag(chance: random.Random, body: Body) -> None:
    _place(chance, body, tuple(f"{_text(chance)}{tag}{_text(chance)}" for tag in TAGS), "content")


def _surrogate(chance: random.Random, body: Body) -> None:
    _place(chance, body, ("\ud800", "a\udfffb", "\ude00\ud83d"), chance.choice(("content", "content", "role")))


def _long_content(chance: random.Random, body: Body) -> None:
    _place(chance, body, (_long(chance),), "content")


def _content(chance: random.Random, body: Body) -> None:
    _place(chance, body, VALUES, "content")


def _field(chance: random.Random, body: Body) -> None:
    name = chance.choice(tuple(FIELDS))
    if OTHER_NAMES.get(name) not in body:  # only `_both_names` sets both
        body[name] = _pick(chance, FIELDS[name])


def _camel_case(chance: random.Random, body: Body) -> None:
    name = chance.choice(tuple(CAMEL_CASE))
    body.pop(CAMEL_CASE[name], None)
    body[name] = _pick(chance, FIELDS[name])


def _both_names(chance: random.Random, body: Body) -> None:
    """Set a field under both of its names."""
    camel, name = chance.choice(tuple(CAMEL_CASE.items()))
    body[camel] = body[name] = True if name == "no_cache" else 1


def _idempotency(chance: random.Random, body: Body) -> None:
    """Set the key of another request, or a new key, which can be resumed only at 0."""
    if chance.random() < 0.4:
        body["idempotency_key"] = TAKEN_KEY
        return
    body["idempotency_key"] = f"{chance.getrandbits(64):016x}"
    body["stream"] = True
    if chance.random() < 0.7:
        body["resume_after_characters"] = chance.choice((0, 0, 1, 9, 2**31 - 1))


def _max_tokens(chance: random.Random, body: Body) -> None:
    if "maxTokens" not in body:
        body["max_tokens"] = _pick(chance, MAX_TOKENS)


def _null(chance: random.Random, body: Body) -> None:
    body[chance.choice(("prompt", "messages", "raw", "stream", *body))] = None


def _any_value(chance: random.Random, body: Body) -> None:
    key, value = chance.choice(("prompt", "messages", "raw", "stream", *body)), _pick(chance, VALUES)
    # See FIELDS; and the decisions of two bodies with one key would depend on their order.
    if not (key in FRACTIONS and isinstance(value, bool)) and not (key == "idempotency_key" and value == "x"):
        body[key] = value


def _without_field(chance: random.Random, body: Body) -> None:
    holder = chance.choice([body, *_messages(body)])
    if holder:
        del holder[chance.choice(tuple(holder))]


def _no_messages(chance: random.Random, body: Body) -> None:
    body["messages"] = []
    if chance.random() < 0.5:
        body.pop("prompt", None)


def _odd_messages(chance: random.Random, body: Body) -> None:
    """Replace a message by something else, or add fields to it."""
    messages = body.get("messages")
    if isinstance(messages, list) and messages:
        messages[chance.randrange(len(messages))] = _pick(chance, (*VALUES, {"role": "user"}, {"content": "x"}))


def _no_object(chance: random.Random, body: Body) -> Any:
    return chance.choice(([body], "x", 5, True, []))


CHANGES: tuple[Change, ...] = (
    *(_other_form, _raw, _raw, _bad_role, _bad_role, _order, _order, _tag, _tag, _surrogate, _long_content, _content),
    *(_field, _field, _camel_case, _max_tokens, _max_tokens, _max_tokens, _max_tokens, _null, _null, _any_value),
    *(_without_field, _no_messages, _odd_messages, _no_object, _idempotency, _both_names),
)
"""The changes. Some are here several times, so that 20,000 bodies meet each exception 100 times."""
