"""The commands of the notes after an install, run against a local server and a script in place of kubectl."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.helm.chart import NAMESPACE, Rendered, Values, render
from tests.helm.test_run import container_of
from tests.support.certificates import Authority
from tests.support.processes import environment

from llama2_server.admission.keys.keys_file import new_key

KEYS: Values = {"apiKeys": {"secret": "keys"}, "test": {"apiKey": {"secret": "key"}}}
TLS: Values = {"tls": {"secret": "server-tls"}}
MUTUAL_TLS: Values = {"tls": {"secret": "server-tls", "clientCaSecret": "client-ca"}}

# Answers `get secret NAME --output jsonpath={.data.KEY}` from files, and does nothing for other commands.
KUBECTL = """#!/bin/sh
[ "$1" = --namespace ] && [ "$2" = {namespace} ] || exit 64
shift 2
case "$1" in
  get) key=$(printf %s "$5" | sed 's/^jsonpath={{.data.//; s/}}$//; s/\\\\//g'); exec base64 "{secrets}/$3/$key" ;;
  rollout | port-forward) exit 0 ;;
  *) exit 64 ;;
esac
"""


def commands_of(release: Rendered) -> list[str]:
    """Return the commands of the notes, which are indented."""
    return [line.strip() for line in release.notes.splitlines() if line.startswith("  ")]


def programs(folder: Path, secrets: Path) -> Path:
    """Write the programs that the commands call, and return their folder."""
    folder.mkdir()
    scripts = {
        "kubectl": KUBECTL.format(namespace=NAMESPACE, secrets=secrets),
        "helm": "#!/bin/sh\n",
        "llama2": f'#!/bin/sh\nexec {sys.executable} -m llama2_client.cli "$@"\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("keys", [{}, KEYS], ids=["without keys", "with keys"])
@pytest.mark.parametrize("tls", [{}, TLS, MUTUAL_TLS], ids=["plaintext", "TLS", "mutual TLS"])
def test_the_commands_print_a_reply(tls: Values, keys: Values, tmp_path: Path) -> None:
    """Each command of the notes runs as it stands, and the last one prints a story."""
    test = keys.get("test", {}) | ({"clientSecret": "client-tls"} if tls == MUTUAL_TLS else {})
    release = render({"demo": True, **tls, **keys, "test": test})
    authority = Authority(tmp_path)
    secrets = {name: tmp_path / "secrets" / name for name in ("server-tls", "client-tls", "client-ca", "key")}
    for folder in secrets.values():
        folder.mkdir(parents=True)
    authority.write(authority.issue(f"llama2.{NAMESPACE}.svc"), secrets["server-tls"])
    authority.write(authority.issue("client"), secrets["client-tls"])
    for name in ("server-tls", "client-ca"):
        (secrets[name] / "ca.crt").write_bytes(authority.root)
    key, line = new_key("tests")
    (secrets["key"] / "api-key").write_text(key)
    (tmp_path / "keys.yaml").write_text(f"keys:\n  {line}\n")
    mounted = {
        "/data": tmp_path,
        "/etc/llama2/keys/keys.yaml": tmp_path / "keys.yaml",
        "/etc/llama2/tls/tls.crt": secrets["server-tls"] / "tls.crt",
        "/etc/llama2/tls/tls.key": secrets["server-tls"] / "tls.key",
        "/etc/llama2/client-ca/ca.crt": secrets["client-ca"] / "ca.crt",
    }
    with container_of(release, mounted) as port:
        folder = programs(tmp_path / "bin", tmp_path / "secrets")
        variables = environment(LLAMA2_ADDRESS=f"127.0.0.1:{port}")
        variables["PATH"] = f"{folder}:{variables['PATH']}"
        script = "set -eu\n" + "\n".join(commands_of(release))
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fox" in done.stdout


def test_notes_name_what_the_commands_need() -> None:
    """Without a test key or client certificate in the values, the notes say what the user must set."""
    notes = render({"demo": True, **MUTUAL_TLS, "apiKeys": {"secret": "keys"}}).notes
    assert "set LLAMA2_API_KEY to a key that `llama2-server keys new` printed" in notes
    assert "write a client certificate that the authority of client-ca signed" in notes
    assert f"must include the name llama2.{NAMESPACE}.svc" in notes
