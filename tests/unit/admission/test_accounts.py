"""Authentication by API keys, and the format of the keys file."""

import asyncio
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import grpc
import grpc.aio
import pytest
import yaml
from tests.support.service import ServiceMaker, until

from llama2.v1 import model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission import accounts
from llama2_server.admission.accounts import (
    ANONYMOUS,
    Account,
    AnonymousAuthenticator,
    ApiKeyAuthenticator,
)
from llama2_server.admission.keys import keys_file
from llama2_server.admission.keys.keys_file import KeysFileError, new_key
from llama2_server.admission.keys.line_format import parse_lines
from llama2_server.errors import AccountDisabled, Unauthenticated


def api_keys_file(path: Path, *entries: str) -> Path:
    """Write a keys file as Kubernetes updates a Secret: a new file replaces the old one."""
    new = path.with_suffix(".new")
    new.write_text("keys:\n" + "".join(f"  {entry}\n" for entry in entries) if entries else "keys: {}\n")
    os.replace(new, path)
    return path


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "test"), ("authorization", f"Bearer {key}"))


def is_valid(authenticator: ApiKeyAuthenticator, key: str) -> bool:
    """Return whether a key is accepted."""
    try:
        authenticator.authenticate(bearer(key))
    except Unauthenticated:
        return False
    return True


def test_valid_key_has_its_account(tmp_path: Path) -> None:
    """Each key belongs to the account of its entry."""
    (first, first_entry), (second, second_entry) = new_key("32118455", "staging"), new_key("b")
    authenticator = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", first_entry, second_entry))
    assert authenticator.authenticate(bearer(first)) == Account("32118455", "staging")
    assert authenticator.authenticate(bearer(second)) == Account("b")
    assert authenticator.authenticate((("authorization", f"bearer {first}"),)).id == "32118455"


def test_numeric_account_id_is_read_as_a_string(tmp_path: Path) -> None:
    """An account id that YAML reads as a number becomes a string, as in the card's overrides."""
    key, entry = new_key("32118455")
    path = api_keys_file(tmp_path / "keys.yaml", entry.replace("'32118455'", "32118455"))
    assert yaml.safe_load(path.read_text())["keys"].popitem()[1]["account"] == 32118455
    assert ApiKeyAuthenticator(path).authenticate(bearer(key)).id == "32118455"


@pytest.mark.parametrize("character", ["\\0", "\\n", "\\x1f", "\\x7f", "\\x85"])
def test_account_with_a_control_character_is_rejected(tmp_path: Path, character: str) -> None:
    """Databases and logs cannot hold such an account; the error names the file and the entry."""
    _, entry = new_key("acme")
    path = api_keys_file(tmp_path / "keys.yaml", entry.replace("account: acme", f'account: "ac{character}me"'))
    with pytest.raises(KeysFileError, match=r"keys\.[0-9a-f]{12}\.account: "):
        ApiKeyAuthenticator(path)


def test_every_invalid_header_gets_the_same_error(tmp_path: Path) -> None:
    """Missing, malformed, unknown, wrong, oversize and duplicated keys cannot be distinguished."""
    key, entry = new_key("a")
    authenticator = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", entry))
    unknown, _ = new_key("a")
    wrong_secret = key[:-1] + ("A" if key[-1] != "A" else "B")
    invalid: list[tuple[tuple[str, str | bytes], ...]] = [
        (),
        (("authorization", key),),
        (("authorization", f"Basic {key}"),),
        (("authorization", b"Bearer " + key.encode()),),
        bearer(""),
        bearer(unknown),
        bearer(wrong_secret),
        bearer(key + "x"),
        bearer(key + " " * 1000),
        bearer("l2_" + "0" * 12 + "_" + "A" * 43),
        (*bearer(key), *bearer(key)),
    ]
    messages = set()
    for metadata in invalid:
        with pytest.raises(Unauthenticated) as rejected:
            authenticator.authenticate(metadata)
        messages.add(str(rejected.value))
    assert len(messages) == 1


def test_disabled_account_has_its_own_error(tmp_path: Path) -> None:
    """A valid key of a disabled account gets a different error, so that the client can ask the operator."""
    key, entry = new_key("a")
    authenticator = ApiKeyAuthenticator(
        api_keys_file(tmp_path / "keys.yaml", entry.replace("enabled: true", "enabled: false"))
    )
    with pytest.raises(AccountDisabled):
        authenticator.authenticate(bearer(key))


def test_entry_does_not_contain_the_key() -> None:
    """An entry contains neither the key nor its secret part, and no two entries are equal."""
    key, entry = new_key("a")
    assert key not in entry
    assert key.split("_", 2)[2] not in entry
    assert len({new_key("a")[1] for _ in range(50)}) == 50


@pytest.fixture
def reload_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the file all the time."""
    monkeypatch.setattr(accounts, "RELOAD_SECONDS", 0.001)


@pytest.mark.usefixtures("reload_at_once")
async def test_changed_file_is_read_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change, the old key is invalid and the new one valid; this process parses nothing."""
    (old, old_entry), (new, new_entry) = new_key("a"), new_key("a", "a name")
    path = api_keys_file(tmp_path / "keys.yaml", old_entry)
    authenticator = ApiKeyAuthenticator(path)
    monkeypatch.setattr(keys_file, "read", None)
    watching = asyncio.create_task(authenticator.watch())
    assert authenticator.authenticate(bearer(old)).id == "a"
    api_keys_file(path, new_entry)
    await until(lambda: is_valid(authenticator, new), 30)
    assert authenticator.authenticate(bearer(new)) == Account("a", "a name")
    assert not is_valid(authenticator, old)
    watching.cancel()


@pytest.mark.usefixtures("reload_at_once")
@pytest.mark.parametrize("content", ["broken: [", None])
async def test_keys_stay_valid_while_the_file_cannot_be_read(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """After the file becomes invalid or is deleted, the previous keys stay valid, and the reload continues."""
    (key, entry), (other, other_entry) = new_key("a"), new_key("b")
    path = api_keys_file(tmp_path / "keys.yaml", entry)
    authenticator = ApiKeyAuthenticator(path)
    watching = asyncio.create_task(authenticator.watch())
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    await until(lambda: bool(caplog.messages), 30)
    assert caplog.messages[0].startswith(
        "API keys reload failed; keeping the previous keys: --api-keys-file: cannot read"
    )
    assert is_valid(authenticator, key)
    api_keys_file(path, other_entry)
    await until(lambda: is_valid(authenticator, other), 30)
    watching.cancel()


async def test_a_large_file_leaves_the_loop_free(tmp_path: Path) -> None:
    """While the child's lines arrive, other tasks run after at most LINES_PER_TURN of them; the tables are equal."""
    count = 10 * keys_file.LINES_PER_TURN
    path = api_keys_file(tmp_path / "keys.yaml", *(new_key(f"account{index}")[1] for index in range(count)))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count_turns())
    assert await keys_file.read_in_child(path) == keys_file.read(path)
    counting.cancel()
    assert turns >= count // keys_file.LINES_PER_TURN


NAMES = (
    "",
    "x",
    "Jane Doe",
    "it's",
    "yes",
    "null",
    "12",
    "1e5",
    "0x1F",
    "a: b",
    "a #b",
    "[x]",
    "é",
    "-",
    "~",
    "'",
    " a ",
)


@pytest.mark.parametrize("indent", ["  ", " ", "    "])
def test_lines_of_keys_new_are_read_as_yaml_does(indent: str) -> None:
    """The fast reader returns what YAML returns, or leaves the file to YAML."""
    entries = [new_key(account or "a", name)[1] for account in NAMES for name in NAMES]
    fast = 0
    for entry in entries:
        text = f"# comment\nkeys:\n{indent}{entry}\n\n"
        parsed = parse_lines(text)
        assert parsed in (None, yaml.safe_load(text))
        fast += parsed is not None
    assert fast > len(entries) / 4
    last_days = [None, date(2027, 1, 31)]
    common = [new_key(f"account-{index}", "Jane Doe", last_days[index % 2])[1] for index in range(500)]
    text = "keys:\n" + "".join(f"{indent}{entry}\n" for entry in common)
    assert parse_lines(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "keys:\n  {0}\n   {1}\n",
        "keys:\n{0}\n",
        "keys: {{{0}}}\n",
        "keys:\n  {0}\nother: 1\n",
        "keys:\n  {0} # comment\n",
        "---\nkeys:\n  {0}\n",
    ],
)
def test_other_files_are_left_to_yaml(text: str) -> None:
    """A file with anything but lines of `keys new` is not read line by line."""
    assert parse_lines(text.format(new_key("a")[1], new_key("b")[1])) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keys"),
        ("keys: []", "keys"),
        ("keys: {short: {}}", "keys.short"),
        ("keys: {0123456789ab: {salt: x, digest: y, account: a}}", "keys.0123456789ab.salt"),
        ("tokens: {}", "keys: Field required"),
        ("a: b: c", "not YAML"),
        ("[" * 500, "not YAML"),
    ],
)
def test_invalid_file_is_rejected(tmp_path: Path, text: str, words: str) -> None:
    """The one-line error for an invalid keys file names the file and the entry."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysFileError) as rejected:
        ApiKeyAuthenticator(path)
    assert str(path) in str(rejected.value)
    assert words in str(rejected.value)
    assert "\n" not in str(rejected.value)


def test_clients_are_anonymous_without_a_keys_file() -> None:
    """Without a keys file, all clients have the same account."""
    assert AnonymousAuthenticator().authenticate(()) == ANONYMOUS


async def test_server_requires_a_key(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Generate and CountTokens require a key; GetModelCard does not."""
    key, entry = new_key("a")
    authenticator = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", entry))
    async with serve_scripted("Hello.", accounts=authenticator) as service:
        request = pb.GenerateRequest(prompt="Hi")
        for call in (
            service.text.Generate(request),
            service.text.CountTokens(pb.CountTokensRequest(prompt="Hi")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await call
            assert rejected.value.code() is grpc.StatusCode.UNAUTHENTICATED
        reply = await service.text.Generate(request, metadata=bearer(key)[1:])
        assert reply.response == "Hello."
        assert (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).model_card.name


def test_command_prints_a_key_and_its_entry(tmp_path: Path) -> None:
    """`llama2-server keys new` prints a key and the entry for the keys file."""
    command = [sys.executable, "-m", "llama2_server", "keys", "new", "42", "--name", "Alice"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    key = re.search(r"^l2_\S+$", printed, re.MULTILINE)
    assert key
    authenticator = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", printed.splitlines()[-1].strip()))
    assert authenticator.authenticate(bearer(key[0])) == Account("42", "Alice")
