"""Compare the chat template of a checkpoint with Llama-2's, which the server uses."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from llama2_server.engine.checkpoint.layout import read_json
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer

logger = logging.getLogger(__name__)

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
# SHA-256 of templates that are known to be equal: Meta's, published with Llama-2-7b-chat-hf, and the demo model's. Most
# starts therefore need not import jinja2.
KNOWN_SHA256 = {
    "e8d5b5a546d3f19df16a5320c614fab05bdc4edd50e850f1afd947b503ea41cf",
    "1623de5159d584da0b6c78f86ae57b2328746122f2c58446ab7f84bce8c7c57f",
}
PROBES: tuple[tuple[ChatMessage, ...], ...] = (
    (ChatMessage("user", "Who are you?"),),
    (ChatMessage("system", "Answer in one sentence."), ChatMessage("user", "What is a llama?")),
    (ChatMessage("user", "Hi!"), ChatMessage("assistant", " Hello.\nHow are you? "), ChatMessage("user", "Well.")),
)
MAX_QUOTED_CHARACTERS = 60

Render = Callable[[Sequence[ChatMessage]], str]


class Outcome(Enum):
    """Result of one probe chat."""

    EQUAL = auto()
    WHITE_SPACE = auto()
    RAISED = auto()
    DIFFERENT = auto()


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template in Jinja, and the special tokens that it renders."""

    path: Path
    source: str
    bos_token: str
    eos_token: str


def check_chat_template(directory: Path, tokenizer: Tokenizer, *, allow_other: bool) -> None:
    """Render three chats with the template of a checkpoint, and compare the token ids with Llama-2's.

    A checkpoint without a template is accepted. If only white space differs, or the template rejects some of the chats,
    one warning is logged.

    Args:
        directory: the checkpoint.
        tokenizer: the checkpoint's tokenizer.
        allow_other: log a warning instead of the error for another template.

    Raises:
        WeightsError: the template is not Llama-2's.
    """
    template = _read_template(directory, tokenizer)
    if template is None or _is_known(template):
        return
    problem = _problem(template, tokenizer)
    if problem and not allow_other:
        raise WeightsError(
            f"{template.path}: {problem}, but the server uses Llama-2's; pass a checkpoint of Llama-2-chat, "
            "or pass --allow-other-chat-template if the model understands Llama-2's template or gets raw prompts only"
        )
    if problem:
        logger.warning("%s: %s; the server uses Llama-2's template", template.path, problem)


def _problem(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """Return the reason why the template is not Llama-2's; log a warning for small differences."""
    from jinja2 import TemplateError

    try:
        render = _compile(template)
    except TemplateError as error:
        return f"the chat template is not valid ({_one_line(error)})"
    outcomes: dict[Outcome, str] = {}
    for probe in PROBES:
        outcome, detail = _compare(render, template, tokenizer, probe)
        outcomes.setdefault(outcome, detail)
    if Outcome.DIFFERENT in outcomes:
        return f"the chat template is not Llama-2's: it starts a chat with {outcomes[Outcome.DIFFERENT]}"
    if set(outcomes) == {Outcome.RAISED}:
        return f"the chat template rejects every chat ({outcomes[Outcome.RAISED]})"
    differences = []
    if Outcome.WHITE_SPACE in outcomes:
        differences.append("has different white space")
    if Outcome.RAISED in outcomes:
        differences.append(f"rejects some chats ({outcomes[Outcome.RAISED]})")
    if differences:
        text = " and ".join(differences)
        logger.warning("%s: the chat template %s; the server uses Llama-2's template", template.path, text)
    return None


def _compare(
    render: Render, template: ChatTemplate, tokenizer: Tokenizer, probe: Sequence[ChatMessage]
) -> tuple[Outcome, str]:
    """Return the outcome of one chat, with the error or the start of the template's text."""
    try:
        text = render(probe)
    # A template is a program. It can raise any exception, and Llama-2's own raises one for invalid roles.
    except Exception as error:
        return Outcome.RAISED, _one_line(error)
    if _encode(text, tokenizer) == tokenizer.encode_chat(probe):
        return Outcome.EQUAL, ""
    bos, eos = tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)
    expected = "".join(f"{bos}{turn}{eos if ended else ''}" for turn, ended in tokenizer.chat_turns(probe))
    if "".join(text.split()) == "".join(expected.split()):
        return Outcome.WHITE_SPACE, ""
    start = text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}…"
    return Outcome.DIFFERENT, json.dumps(start, ensure_ascii=False)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a rendered chat; the text between special tokens is encoded separately, as by transformers."""
    special = {tokenizer.token(token_id): token_id for token_id in (tokenizer.bos_id, tokenizer.eos_id)}
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        ids += [special[part]] if part in special else tokenizer.encode_raw(part)[1:]
    return ids


def _compile(template: ChatTemplate) -> Render:
    """Return a function that renders the template in a sandbox, with the functions that transformers offers."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that marks a reply for training; it renders its body."""

        tags = {"generation"}  # noqa: RUF012 - as the base class declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: form  # no template of Llama-2 contains a date
    compiled = environment.from_string(template.source)

    def render(messages: Sequence[ChatMessage]) -> str:
        return compiled.render(
            messages=[message._asdict() for message in messages],
            bos_token=template.bos_token,
            eos_token=template.eos_token,
            add_generation_prompt=True,
        )

    return render


def _read_template(directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template that transformers would use, if any."""
    path = directory / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    source = _default_template(config.get("chat_template"))
    if (directory / TEMPLATE_FILE).is_file():
        path = directory / TEMPLATE_FILE
        source = path.read_bytes().decode(errors="replace")
    if not source:
        return None
    defaults = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    bos, eos = (_token_name(config.get(key)) or tokenizer.token(token_id) for key, token_id in defaults)
    return ChatTemplate(path, source, bos, eos)


def _default_template(entry: Any) -> str | None:
    """Return the default of one or several named templates."""
    if isinstance(entry, list):
        entry = dict(_named_templates(entry))
    if isinstance(entry, dict):
        entry = entry.get("default")
    return entry if isinstance(entry, str) else None


def _named_templates(entries: list[Any]) -> Iterator[tuple[Any, Any]]:
    for entry in entries:
        if isinstance(entry, dict):
            yield entry.get("name"), entry.get("template")


def _token_name(entry: Any) -> str | None:
    """Return the text of a special token, which older versions stored with its properties."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def _is_known(template: ChatTemplate) -> bool:
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    return digest in KNOWN_SHA256 and (template.bos_token, template.eos_token) == ("<s>", "</s>")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
