"""The least memory that weights can need, before torch is imported."""

from typing import Any

import pytest

from llama2_server.config.settings import Settings
from llama2_server.lifecycle.checks import checkpoint


@pytest.mark.parametrize(
    ("settings", "slots", "amx", "packs"),
    [
        ({}, 1, False, True),
        ({}, 8, False, False),
        ({}, 8, True, True),
        ({"cpu_kernels": "amx"}, 8, True, True),
        ({"cpu_kernels": "amx"}, 8, False, False),
        ({"cpu_kernels": "portable"}, 8, True, False),
        ({"cpu_kernels": "portable"}, 1, True, True),
        ({"cpu_weight_bits": "12"}, 8, False, True),
        ({"cpu_weight_bits": "16"}, 1, True, False),
        ({"cpu_kernels": "torch"}, 1, True, False),
        ({"cpu_kernels": "torch", "cpu_weight_bits": "12"}, 1, True, False),
    ],
)
def test_weights_may_take_12_bits(
    settings: dict[str, Any], slots: int, amx: bool, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX for any number of slots, otherwise by default only for one."""
    monkeypatch.setattr(checkpoint, "has_amx", lambda: amx)
    assert checkpoint._may_pack(Settings.model_validate(settings), slots) == packs
