"""Whether the machine has an NVIDIA card or driver, from made files of Linux, and the versions of the driver."""

import shutil
import subprocess
from pathlib import Path

import pytest

from llama2_server.engine.cuda import driver
from llama2_server.engine.cuda.driver import driver_versions, has_nvidia_device

DRIVER_SOURCE = "int cuDriverGetVersion(int *version) { *version = 13020; return 0; }"


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


@pytest.mark.skipif(shutil.which("cc") is None, reason="NOT TESTED: no C compiler found")
def test_the_driver_reports_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of the driver with one function answers as NVIDIA's does."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(DRIVER_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(driver, "DRIVER_LIBRARY", str(library))
    monkeypatch.setattr(driver, "kernel_module", lambda: "NVRM version: 580")
    assert driver_versions() == "13020, NVRM version: 580"
