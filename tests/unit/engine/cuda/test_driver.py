"""Whether the machine has an NVIDIA card or driver, from made files of Linux."""

from pathlib import Path

import pytest

from llama2_server.engine.cuda.driver import has_nvidia_device


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"proc/driver/nvidia/version": "NVRM version"}, True),
        ({"dev/nvidiactl": ""}, True),
        ({"usr/lib/wsl/lib/libcuda.so.1": ""}, True),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x030200\n"}, True),
        # A sound device on the card, and another vendor's card.
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x040300\n"}, False),
        ({"sys/bus/pci/devices/0/vendor": "0x1002\n", "sys/bus/pci/devices/0/class": "0x030000\n"}, False),
    ],
)
def test_card_or_driver_is_found(files: dict[str, str], expected: bool, tmp_path: Path) -> None:
    """A driver counts without a card, and a card without a driver."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert has_nvidia_device(tmp_path) is expected
