"""External programs of the image test: which are missing, and how they run."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence

PROGRAMS = {"buildah": "buildah", "runc": "runc", "debootstrap": "debootstrap"}
"""Each program and the Debian package that has it."""


class ImageError(Exception):
    """A step or a check of the image test failed; the message has the output."""


def missing() -> list[str]:
    """Return the Debian packages whose programs are not installed."""
    return sorted(package for program, package in PROGRAMS.items() if shutil.which(program) is None)


def run(call: Sequence[str]) -> str:
    """Run a command and return its standard output.

    Raises:
        ImageError: the command failed; the message has the end of its output.
    """
    done = subprocess.run([*call], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise ImageError(f"{shlex.join(call)}: exit code {done.returncode}\n{output}")
    return done.stdout
