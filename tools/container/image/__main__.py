"""Build the image with buildah, write its SBOM, and run it under runc: `make image-test`.

It needs root, x86-64 Linux, a Debian mirror, and the Debian packages buildah, runc and debootstrap. It uses the PIP_
variables of this machine, with the files that they name. docs/container.md describes what it checks.
"""

import argparse
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.audit.sbom import bill_of_tree, distributions, packages_of
from tools.container.image.build import (
    ROOT,
    TAG,
    Bases,
    Buildah,
    build,
    configuration,
    make_bases,
    pip_volumes,
    write_pip_config,
)
from tools.container.image.checks import ENVIRONMENT, check_container, check_size
from tools.container.image.command import ImageError, missing
from tools.container.image.container import Bundle, running
from tools.container.lock import image_python_version, read_lock
from tools.container.prune import size

VARIABLES = {"LLAMA2_ALLOW_UNAUTHENTICATED": "true"}


def main() -> int:
    """Run the image test of the command line, and return the exit code."""
    options = _options()
    if problem := _problem():
        print(f"make image-test: {problem}", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    buildah = Buildah(options.work / "storage")
    try:
        _make(buildah, options)
        with _mounted(buildah) as root:
            _inspect(root, options.out)
            _run(root, buildah, options)
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            buildah.remove()
            shutil.rmtree(options.work)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make image-test ARGS=…", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "image", help="folder for everything temporary")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom", help="folder of the SBOM")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="URL of a Debian mirror")
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX"), help="index of torch's CPU build")
    parser.add_argument("--volume", action="append", default=[], help="HOST:CONTAINER, mounted during the build")
    parser.add_argument(
        "--seccomp",
        type=Path,
        default=Path("/usr/share/containers/seccomp.json"),
        help="seccomp profile of the container",
    )
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder, and use the bases in it")
    return parser.parse_args()


def _problem() -> str | None:
    """Return the reason why this machine cannot run the test, or None."""
    if sys.platform != "linux" or os.uname().machine != "x86_64" or os.geteuid() != 0:
        return "run it as root on x86-64 Linux"
    wanted = image_python_version().rpartition(".")[0]
    if "{}.{}".format(*sys.version_info) != wanted:
        return f"the image has Python {wanted}; run it with that version (PYTHON=python{wanted})"
    if absent := missing():
        return f"not installed: apt-get install {' '.join(absent)}"
    return None


def _make(buildah: Buildah, options: argparse.Namespace) -> None:
    bases = Bases.read()
    stand_ins = make_bases(buildah, bases.release, options.mirror, options.work)
    names = " and ".join(name.partition("@")[0] for name in bases.names)
    _report(f"bases: Debian {bases.release} and Python {sys.version.split()[0]} stand in for {names}")
    arguments = [f"--build-arg=TORCH_INDEX={options.torch_index}"] if options.torch_index else []
    volumes = [
        write_pip_config(options.work / "pip.conf"),
        *pip_volumes(),
        *(f"--volume={one}" for one in options.volume),
    ]
    build(buildah, zip(bases.names, stand_ins, strict=True), [*arguments, *volumes])
    _report("built the unchanged Dockerfile")


def _inspect(root: Path, out: Path) -> None:
    """Check the size of the image and write its SBOM, which must have the packages of the lock file."""
    total, environment = size(root), size(root / ENVIRONMENT)
    print(check_size(total))
    print(f"        /{ENVIRONMENT}: {environment / 1e6:.0f} MB; base: {(total - environment) / 1e6:.0f} MB")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    locked = {name: str(pin.version) for name, pin in read_lock(ROOT / "requirements/server-cpu.lock").items()}
    if distributions(packages_of(root)) != locked | {"llama2-grpc": version}:
        raise ImageError("FAILED  the packages of the image are not those of requirements/server-cpu.lock")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "image.cdx.json"
    path.write_text(bill_of_tree(root, version), encoding="utf-8")
    count = len(json.loads(path.read_text(encoding="utf-8"))["components"])
    print(f"ok      SBOM: {count} components of Python and Debian in {path}")


def _run(root: Path, buildah: Buildah, options: argparse.Namespace) -> None:
    image = configuration(buildah)
    bundle = Bundle.write(options.work / "bundle", root, image, options.seccomp, VARIABLES)
    try:
        with running(bundle, f"llama2-image-test-{os.getpid()}") as container:
            for line in check_container(container, image):
                print(line)
    finally:
        bundle.remove()


@contextmanager
def _mounted(buildah: Buildah) -> Iterator[Path]:
    """Mount the files of the built image."""
    container = buildah("from", "--pull-never", TAG)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("umount", container)
        buildah("rm", container)


def _report(text: str) -> None:
    print(f"{time.monotonic() - START:5.0f} s  {text}", flush=True)


START = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
