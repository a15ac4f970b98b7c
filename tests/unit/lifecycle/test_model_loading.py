"""Loading with the settings and the card, on small checkpoints."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import edit_json
from tools.make_checkpoint import Shape, make_checkpoint

from llama2_server.card import load_card
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.model import llama
from llama2_server.engine.text.tokenizer import ChatMessage
from llama2_server.lifecycle import model_loading
from llama2_server.lifecycle.model_loading import LoadedModel, load_model


def load(weights: Path, data_directory: Path, card: str = "demo", **settings: object) -> LoadedModel:
    """Load a checkpoint on the CPU."""
    values = {"weights": str(weights), "data_directory": data_directory, "device": "cpu", **settings}
    return load_model(Settings.model_validate(values), load_card(card))


def test_a_short_published_context_has_a_remedy(tmp_path: Path) -> None:
    """Llama-2-chat was first published with 2048 positions; the error names the setting that corrects the value."""
    weights = make_checkpoint(tmp_path / "weights", Shape(context=2048))
    expected = (
        r"--weights: .*config\.json: max_position_embeddings is 2048, expected at least 3072; if .* 4096 tokens, "
    )
    with pytest.raises(ConfigurationError, match=expected + "set --max-position-embeddings; otherwise lower"):
        load(weights, tmp_path, "llama-2-7b-chat-fp16")
    for _ in range(2):  # the second time with the cached configuration
        loaded = load(weights, tmp_path, "llama-2-7b-chat-fp16", max_position_embeddings=4096)
        assert loaded.model.context_length == 3072


def test_another_chat_template_needs_a_setting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ChatML is rejected with the name of the setting that allows it; then a warning remains."""
    weights = make_checkpoint(tmp_path / "weights", Shape(context=1024))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    edit_json(weights, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ConfigurationError, match=r"--weights: .*the chat template .* pass --allow-other-chat-template"):
        load(weights, tmp_path)
    load(weights, tmp_path, allow_other_chat_template=True)
    assert "the server uses Llama-2's template" in caplog.text


@pytest.mark.parametrize("context", [3072, 4096])
def test_the_demo_weights_work_with_any_card(tmp_path: Path, context: int) -> None:
    """Also with a card whose context is longer than the one of the demo model."""
    shipped = resources.files("llama2_server") / "cards" / "llama-2-7b-chat-fp16.yaml"
    card = tmp_path / "card.yaml"
    card.write_text(shipped.read_text().replace("3072", str(context)))
    loaded = load(Path("demo"), tmp_path, str(card))
    assert loaded.model.context_length == context
    assert isinstance(loaded.model, llama.LlamaModel)
    prompt_ids = loaded.tokenizer.encode_chat([ChatMessage("user", "Hello")])
    assert loaded.model.prefill(0, prompt_ids, 0).isfinite().all()


def test_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a small model, the cores of this process for a large one, or the setting."""
    weights = make_checkpoint(tmp_path / "weights", Shape(context=1024))

    def threads(**settings: Any) -> int:
        model = load(weights, tmp_path, **settings).model
        assert isinstance(model, llama.LlamaModel)
        return model.threads

    monkeypatch.setattr(llama, "CPU_THREADS", 3)
    assert threads() == 1
    assert threads(threads=2) == 2
    monkeypatch.setattr(llama, "SMALL_MODEL_BYTES", 0)
    assert threads() == 3
    assert threads(threads=2) == 2


@pytest.mark.parametrize("has_device", [True, False])
def test_a_gpu_that_torch_cannot_use_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_device: bool
) -> None:
    """With --device auto, the CPU runs the model; the warning has torch's reason. Without a GPU there is no warning."""
    weights = make_checkpoint(tmp_path / "weights", Shape(context=1024))
    monkeypatch.setattr(model_loading, "unusable_reason", lambda: "the driver is too old")
    monkeypatch.setattr(model_loading, "has_nvidia_device", lambda: has_device)
    assert load(weights, tmp_path, device="auto").model.device.type == "cpu"
    warning = "running on the CPU, although this machine has an NVIDIA device: the driver is too old; install a CUDA"
    assert (warning in caplog.text) is has_device
    with pytest.raises(ConfigurationError, match="--device: cuda was requested, but torch cannot use it: the driver"):
        load(weights, tmp_path, device="cuda")
