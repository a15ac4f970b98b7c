"""Whether this machine has an NVIDIA card or driver, without torch, and the reason why torch cannot use it."""

import ctypes
import warnings
from pathlib import Path

NVIDIA_VENDOR = "0x10de"
DRIVER_LIBRARY = "libcuda.so.1"  # which torch loads too
DISPLAY_CLASSES = ("0x0300", "0x0302")  # a VGA controller, a 3D controller


def has_nvidia_device(root: Path = Path("/")) -> bool:
    """Return whether Linux lists an NVIDIA graphics card or has loaded NVIDIA's driver."""
    drivers = ("proc/driver/nvidia/version", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")
    if any((root / driver).exists() for driver in drivers):
        return True
    return any(
        _content(device / "vendor") == NVIDIA_VENDOR and _content(device / "class").startswith(DISPLAY_CLASSES)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )


def kernel_module(root: Path = Path("/")) -> str:
    """Return the version line of NVIDIA's kernel module; empty without one, as in WSL."""
    return _content(root / "proc/driver/nvidia/version").partition("\n")[0]


def driver_versions() -> str:
    """Return the version of CUDA that the driver supports, such as 13000, and the line of `kernel_module`.

    Raises:
        OSError: this machine has no library of the driver.
    """
    version = ctypes.c_int()
    ctypes.CDLL(DRIVER_LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value}, {kernel_module()}"


def unusable_reason() -> str | None:
    """Return torch's reason why no CUDA device can be used, on one line; None if one can be used."""
    import torch  # this module is imported before torch

    # torch warns at the first use, and raises the same text from `init`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (AssertionError, RuntimeError) as error:
            return " ".join(str(error).split())
    return "torch finds no CUDA device"


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
