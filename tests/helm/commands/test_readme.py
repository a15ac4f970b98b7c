"""The commands of the chart's README, run with scripts in place of docker, kind, helm and kubectl."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.helm.chart import NAMESPACE, Manifest, Rendered, Values, environment_of, render, values_of
from tests.helm.test_run import container_of
from tests.support.processes import environment
from tools.chart import CHART

README = (CHART / "README.md").read_text(encoding="utf-8")

# `helm install NAME CHART` with --set NAME=VALUE and --values FILE: renders the chart, as a cluster would get it.
HELM = """#!{python}
import json, sys
from pathlib import Path
import helm_python, yaml
arguments = sys.argv[1:]
if arguments[0] == "install":
    values, rest = {{}}, iter(arguments[3:])
    for word in rest:
        if word == "--set":
            name, _, value = next(rest).partition("=")
            values[name] = yaml.safe_load(value)
        elif word == "--values":
            values |= yaml.safe_load(Path(next(rest)).read_text())
        elif word == "--timeout":
            next(rest)
        elif word != "--wait":
            sys.exit(f"unknown option: {{word}}")
    helm_python.Chart.load(Path(arguments[2])).render(values, name=arguments[1], namespace="{namespace}")
    Path("values.json").write_text(json.dumps(values))
elif arguments != ["test", "llama2", "--logs"]:
    sys.exit(f"unknown command: {{arguments}}")
"""
# `kubectl create secret generic NAME` with --from-file and --from-literal: writes the keys of the Secret to a folder.
KUBECTL = """#!/bin/sh
set -eu
[ "$1" != port-forward ] || exit 0
[ "$1 $2 $3" = "create secret generic" ] || exit 64
mkdir -p "secrets/$4"
secret=secrets/$4
shift 4
for option in "$@"; do
  case "$option" in
    --from-file=*) cp "${option#--from-file=}" "$secret/" ;;
    --from-literal=*=*) pair=${option#--from-literal=}; printf %s "${pair#*=}" > "$secret/${pair%%=*}" ;;
    *) exit 64 ;;
  esac
done
"""


def block(language: str, containing: str) -> str:
    """Return the only code block of a language that contains a text."""
    (found,) = (text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text)
    return str(found)


def execute(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run commands of the README in a folder that has the chart; they end at the first error."""
    programs = folder / "bin"
    programs.mkdir()
    (folder / "helm").symlink_to(CHART.parent)
    scripts = {
        "docker": "#!/bin/sh\n",
        "kind": "#!/bin/sh\n",
        "helm": HELM.format(python=sys.executable, namespace=NAMESPACE),
        "kubectl": KUBECTL,
        "llama2": f'#!/bin/sh\nexec {sys.executable} -m llama2_client.cli "$@"\n',
        "llama2-server": f'#!/bin/sh\nexec {sys.executable} -m llama2_server "$@"\n',
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environ = environment(**variables)
    environ["PATH"] = f"{programs}:{environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f"set -eu\n{script}"],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def installed(folder: Path) -> Rendered:
    """Return the release that the script in place of helm has rendered."""
    return render(json.loads((folder / "values.json").read_text()))


def secret_keys(pod: Manifest) -> Iterator[tuple[str, str | None]]:
    """Yield each Secret that a pod needs, with the key, or None if the pod mounts all keys."""
    spec = pod["spec"]
    for volume in spec.get("volumes", []):
        if secret := volume.get("secret"):
            for item in secret.get("items", [{"key": None}]):
                yield secret["secretName"], item["key"]
    for container in (*spec.get("initContainers", []), *spec["containers"]):
        for value in environment_of(container).values():
            if isinstance(value, dict) and (reference := value.get("secretKeyRef")):
                yield reference["name"], reference["key"]


def test_the_first_commands_install_the_demo_and_print_a_story(tmp_path: Path) -> None:
    """The commands for a laptop run as they stand, and the last one prints a story from the demo's container."""
    data = tmp_path / "data"
    data.mkdir()
    with container_of(render(values_of("demo")), {"/data": data}) as port:
        done = execute(block("sh", "kind load"), tmp_path, LLAMA2_ADDRESS=f"127.0.0.1:{port}")
    assert done.returncode == 0, done.stderr
    assert "fox" in done.stdout
    assert installed(tmp_path).workload["kind"] == "Deployment"


def test_the_commands_for_a_gpu_create_what_the_pods_need(tmp_path: Path) -> None:
    """The commands create the Secrets that the values of the README name, with the keys that the pods read."""
    (tmp_path / "my-values.yaml").write_text(block("yaml", "llama2-keys"))
    done = execute(block("sh", "llama2-keys"), tmp_path)
    assert done.returncode == 0, done.stderr
    created = {path.name: {key.name for key in path.iterdir()} for path in (tmp_path / "secrets").iterdir()}
    needed = list(secret_keys(installed(tmp_path).pod))
    assert created.keys() == {secret for secret, _ in needed}
    assert [(secret, key) for secret, key in needed if key is not None and key not in created[secret]] == []
    (entry,) = yaml.safe_load((tmp_path / "secrets/llama2-keys/keys.yaml").read_text())["keys"].values()
    assert str(entry["account"]) == "42"


@pytest.mark.parametrize("containing", ["replicas: 4", "envoy: {enabled: true}"])
def test_values_in_addition_are_valid(containing: str) -> None:
    """The other values of the README render together with those for a GPU."""
    values = merge(yaml.safe_load(block("yaml", "llama2-keys")), yaml.safe_load(block("yaml", containing)))
    assert render(values).workload["kind"] == "StatefulSet"


def merge(values: Values, added: Values) -> Values:
    """Merge values as Helm merges two files: key by key in each map."""
    both = {key: merge(values[key], added[key]) for key in values.keys() & added.keys() if isinstance(added[key], dict)}
    return values | added | both
