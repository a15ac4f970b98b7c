"""Another chat template than Llama-2's is found by the token ids of three chats."""

import json
import logging
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import edit_json
from tools.make_checkpoint import CHAT_TEMPLATE

from llama2_server.engine.checkpoint import chat_template
from llama2_server.engine.checkpoint.chat_template import check_chat_template
from llama2_server.engine.checkpoint.tokenizer_files import open_tokenizer
from llama2_server.engine.errors import WeightsError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}{{ 'ASSISTANT:' }}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
NO_SYSTEM = CHAT_TEMPLATE.replace(
    "{% set loop_messages = messages[1:] %}",
    "{{ raise_exception('no system role') }}{% set loop_messages = messages %}",
)
GENERATION = CHAT_TEMPLATE.replace(
    "{{ ' '  + content.strip() + ' ' + eos_token }}",
    "{% generation %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endgeneration %}",
)
# The form in which current transformers saves a template, with line breaks and indentation.
ON_LINES = CHAT_TEMPLATE.replace("{%", "\n  {%-").replace("%}", "-%}")


def check(directory: Path, *, allow_other: bool = False) -> None:
    check_chat_template(directory, open_tokenizer(directory), allow_other=allow_other)


def set_template(directory: Path, template: Any) -> None:
    edit_json(directory, "tokenizer_config.json", chat_template=template)


EQUAL: dict[str, Any] = {
    "published": CHAT_TEMPLATE,
    "on lines": ON_LINES,
    "generation blocks": GENERATION,
    "named": [{"name": "tool_use", "template": CHATML}, {"name": "default", "template": CHAT_TEMPLATE}],
    "by name": {"tool_use": CHATML, "default": CHAT_TEMPLATE},
    "none": None,
    "empty": "",
    "no default": [{"name": "tool_use", "template": CHATML}],
    "only for a reply": "{% if not add_generation_prompt %}{{ raise_exception('no reply') }}{% endif %}"
    + CHAT_TEMPLATE,
    "literal tokens": CHAT_TEMPLATE.replace("bos_token", "'<s>'").replace("eos_token", "'</s>'"),
}


@pytest.mark.parametrize("template", EQUAL.values(), ids=EQUAL.keys())
def test_equal_templates_are_accepted(copy: Path, caplog: pytest.LogCaptureFixture, template: Any) -> None:
    """A template with the same token ids, and a checkpoint without one, are accepted in silence."""
    set_template(copy, template)
    check(copy)
    assert caplog.messages == []


def test_a_missing_tokenizer_config_is_accepted(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Base models and old conversions have no template."""
    (copy / "tokenizer_config.json").unlink()
    check(copy)
    assert caplog.messages == []


def test_old_forms_of_special_tokens_are_read(copy: Path) -> None:
    """The tokens of the template may be stored with their properties."""
    token = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "special": True}
    edit_json(copy, "tokenizer_config.json", bos_token=token, eos_token={"content": "</s>"}, chat_template=ON_LINES)
    check(copy)


OTHER: dict[str, tuple[str, str]] = {
    "ChatML": (CHATML, r'starts a chat with "<\|im_start\|>user\\nWho are you\?'),
    "Vicuna": (VICUNA, r'starts a chat with "<s>USER: Who are you\? ASSISTANT:"'),
    "Mistral": (MISTRAL, r'starts a chat with "<s>\[INST\] Hi! \[/INST\]'),
    "another language": ("Nutzer: {{ messages[-1].content }} Gerät:", r'starts a chat with "Nutzer: .* Gerät:"'),
    "no start token": (CHAT_TEMPLATE.replace("bos_token + ", ""), r'starts a chat with "\[INST\] Who'),
    "another system prompt": (
        CHAT_TEMPLATE.replace("<<SYS>>", "<<SYSTEM>>"),
        r'starts a chat with "<s>\[INST\] <<SYSTEM>>',
    ),
    "broken": ("{% if %}", r"is not valid \(TemplateSyntaxError: .*\)"),
    "rejects everything": ("{{ raise_exception('tools only') }}", r"rejects every chat \(TemplateError: tools only\)"),
    "escapes": ("{{ messages.__class__.__mro__ }}", r"rejects every chat \(SecurityError: .*\)"),
}


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(("template", "problem"), OTHER.values(), ids=OTHER.keys())
def test_other_templates_are_rejected_unless_allowed(
    copy: Path, caplog: pytest.LogCaptureFixture, template: str, problem: str, in_file: bool
) -> None:
    """One line shows the start of a chat and the setting, which turns the error into a warning."""
    if in_file:
        (copy / "chat_template.jinja").write_text(template)
    else:
        set_template(copy, template)
    name = "chat_template.jinja" if in_file else "tokenizer_config.json"
    with pytest.raises(WeightsError, match=f"{re.escape(name)}: the chat template .*{problem}") as rejection:
        check(copy)
    assert "; pass a checkpoint of Llama-2-chat, or pass --allow-other-chat-template" in str(rejection.value)
    assert "\n" not in str(rejection.value)
    assert caplog.messages == []
    check(copy, allow_other=True)
    (message,) = caplog.messages
    assert re.search(f"the chat template .*{problem}", message)
    assert message.endswith("; the server uses Llama-2's template")


WARNED: dict[str, tuple[str, str]] = {
    "white space": (CHAT_TEMPLATE.replace("' [/INST]'", "'  [/INST]\\n'"), "has different white space"),
    "untrimmed replies": (
        CHAT_TEMPLATE.replace("' '  + content.strip()", "' '  + content"),
        "has different white space",
    ),
    "no system role": (NO_SYSTEM, "rejects some chats (TemplateError: no system role)"),
    "both": (
        NO_SYSTEM.replace("' [/INST]'", "'[/INST]'"),
        "has different white space and rejects some chats (TemplateError: no system role)",
    ),
}


@pytest.mark.parametrize(("template", "difference"), WARNED.values(), ids=WARNED.keys())
def test_small_differences_are_warnings(
    copy: Path, caplog: pytest.LogCaptureFixture, template: str, difference: str
) -> None:
    """Other white space, and a template without a system role, are accepted with one warning."""
    set_template(copy, template)
    check(copy)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"the chat template {difference}; the server uses Llama-2's template" in record.getMessage()


@pytest.mark.parametrize("is_list", [False, True])
def test_the_default_of_named_templates_counts(copy: Path, is_list: bool) -> None:
    """The others are for tools; an entry of another form is none."""
    named: dict[str, Any] = {"tool_use": CHAT_TEMPLATE, "default": CHATML}
    entries = [{"name": name, "template": template} for name, template in named.items()]
    set_template(copy, ["text", *entries] if is_list else named)
    with pytest.raises(WeightsError, match=OTHER["ChatML"][1]):
        check(copy)


def test_the_template_file_wins(copy: Path) -> None:
    """As in transformers, chat_template.jinja is used if both exist."""
    set_template(copy, CHATML)
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    check(copy)


def test_another_end_token_is_another_template(copy: Path) -> None:
    """With ChatML's end token, even the published template ends a reply differently."""
    edit_json(copy, "tokenizer_config.json", eos_token="<|im_end|>")  # noqa: S106
    with pytest.raises(WeightsError, match="the chat template is not Llama-2's"):
        check(copy)


def test_a_broken_tokenizer_config_is_rejected(copy: Path) -> None:
    """The error names the file."""
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json: not valid JSON"):
        check(copy)


@pytest.mark.parametrize("source", ["published", "demo"])
def test_known_templates_are_equal_and_need_no_jinja(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    """The templates that skip the comparison pass it."""
    demo = json.loads((Path(str(resources.files("llama2_server"))) / "demo/tokenizer_config.json").read_text())
    set_template(copy, CHAT_TEMPLATE if source == "published" else demo["chat_template"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)  # an import would fail
        check(copy)
    monkeypatch.setattr(chat_template, "KNOWN_SHA256", set())
    check(copy)
    assert caplog.messages == []
