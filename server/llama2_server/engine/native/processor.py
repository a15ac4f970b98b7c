"""What the operating system reports about the processor; without torch and without the native library."""

from pathlib import Path

AMX_FLAGS = frozenset({"amx_bf16", "amx_tile"})


def has_amx(root: Path = Path("/")) -> bool:
    """Return whether the processor and the kernel of the operating system have Intel AMX; False if unknown."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= AMX_FLAGS
