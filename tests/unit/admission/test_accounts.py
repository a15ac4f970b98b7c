"""API keys: who gets in, who does not, and what a keys file may hold."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
import yaml
from tests.support.service import ServiceMaker
from tests.support.virtual_time import run_virtual

from llama2.v1 import model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import (
    ANONYMOUS,
    Account,
    AnonymousAuthenticator,
    ApiKeyAuthenticator,
    KeysFileError,
    new_key,
)
from llama2_server.errors import AccountDisabled, Unauthenticated


def api_keys_file(path: Path, *lines: str) -> Path:
    """Write a keys file the way Kubernetes changes a secret: a new file takes the old one's place."""
    fresh = path.with_suffix(".new")
    fresh.write_text("keys:\n" + "".join(f"  {line}\n" for line in lines) if lines else "keys: {}\n")
    os.replace(fresh, path)
    return path


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "test"), ("authorization", f"Bearer {key}"))


def test_valid_key_is_its_account(tmp_path: Path) -> None:
    """Each key is the account that its line names."""
    (first, first_line), (second, second_line) = new_key("32118455", "staging"), new_key("b")
    accounts = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", first_line, second_line))
    assert accounts.authenticate(bearer(first)) == Account("32118455", "staging")
    assert accounts.authenticate(bearer(second)) == Account("b")
    assert accounts.authenticate((("authorization", f"bearer {first}"),)).id == "32118455"


def test_numeric_account_id_is_the_cards(tmp_path: Path) -> None:
    """An account id that YAML reads as a number is the string that the card's overrides use."""
    key, line = new_key("32118455")
    path = api_keys_file(tmp_path / "keys.yaml", line.replace("'32118455'", "32118455"))
    assert yaml.safe_load(path.read_text())["keys"].popitem()[1]["account"] == 32118455
    assert ApiKeyAuthenticator(path).authenticate(bearer(key)).id == "32118455"


def test_every_bad_header_gets_one_and_the_same_answer(tmp_path: Path) -> None:
    """Missing, malformed, unknown, wrong, oversize and duplicated keys cannot be told apart."""
    key, line = new_key("a")
    accounts = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", line))
    unknown, _ = new_key("a")
    wrong_secret = key[:-1] + ("A" if key[-1] != "A" else "B")
    bad: list[tuple[tuple[str, str | bytes], ...]] = [
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
    for metadata in bad:
        with pytest.raises(Unauthenticated) as refused:
            accounts.authenticate(metadata)
        messages.add(str(refused.value))
    assert len(messages) == 1


def test_disabled_account_is_told_so(tmp_path: Path) -> None:
    """A good key of a disabled account is answered differently: its owner should ask."""
    key, line = new_key("a")
    accounts = ApiKeyAuthenticator(
        api_keys_file(tmp_path / "keys.yaml", line.replace("enabled: true", "enabled: false"))
    )
    with pytest.raises(AccountDisabled):
        accounts.authenticate(bearer(key))


def test_file_holds_no_key(tmp_path: Path) -> None:
    """Neither a key nor its secret part can be read from the line."""
    key, line = new_key("a")
    assert key not in line
    assert key.split("_", 2)[2] not in line
    assert len({new_key("a")[1] for _ in range(50)}) == 50


def test_changed_file_is_read_within_five_seconds(tmp_path: Path) -> None:
    """After a change the old key is dead and the new one works, within 5 s by the clock of the loop."""
    (old, old_line), (new, new_line) = new_key("a"), new_key("a")
    path = api_keys_file(tmp_path / "keys.yaml", old_line)

    async def main() -> None:
        accounts = ApiKeyAuthenticator(path)
        watching = asyncio.create_task(accounts.watch())
        patience = 4.9
        await asyncio.sleep(patience)
        api_keys_file(path, new_line)
        await asyncio.sleep(patience)
        assert accounts.authenticate(bearer(new)).id == "a"
        with pytest.raises(Unauthenticated):
            accounts.authenticate(bearer(old))
        watching.cancel()

    run_virtual(main())


@pytest.mark.parametrize("ending", ["broken: [", None])
def test_broken_file_leaves_the_keys_as_they_are(tmp_path: Path, ending: str | None) -> None:
    """A file that became unreadable, or is gone, neither locks everybody out nor lets anybody in."""
    key, line = new_key("a")
    path = api_keys_file(tmp_path / "keys.yaml", line)

    async def main() -> None:
        accounts = ApiKeyAuthenticator(path)
        watching = asyncio.create_task(accounts.watch())
        if ending is None:
            path.unlink()
        else:
            path.write_text(ending)
        patience = 5.0
        await asyncio.sleep(patience)
        assert accounts.authenticate(bearer(key)).id == "a"
        assert not watching.done()
        watching.cancel()

    run_virtual(main())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keys"),
        ("keys: []", "keys"),
        ("keys: {short: {}}", "keys.short"),
        ("keys: {0123456789ab: {salt: x, digest: y, account: a}}", "keys.0123456789ab.salt"),
        ("tokens: {}", "keys: Field required"),
        ("a: b: c", "not YAML"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    """A keys file that cannot be used is refused in one line that names the file and the entry."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysFileError) as refused:
        ApiKeyAuthenticator(path)
    assert str(path) in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_open_service_is_anonymous() -> None:
    """Without a keys file everybody is one account."""
    assert AnonymousAuthenticator().authenticate(()) == ANONYMOUS


async def test_key_is_asked_for_on_the_wire(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Generate and CountTokens need a key; health, reflection and the card do not."""
    key, line = new_key("a")
    accounts = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", line))
    async with serve_scripted("Hello.", accounts=accounts) as service:
        request = pb.GenerateRequest(prompt="Hi")
        for refused_call in (
            service.text.Generate(request),
            service.text.CountTokens(pb.CountTokensRequest(prompt="Hi")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await refused_call
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        reply = await service.text.Generate(request, metadata=bearer(key)[1:])
        assert reply.response == "Hello."
        assert (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).model_card.name


def test_command_prints_key_and_line(tmp_path: Path) -> None:
    """`llama2-server keys new` prints a key and the line that makes it valid."""
    call = [sys.executable, "-m", "llama2_server", "keys", "new", "42", "--name", "Alice"]
    printed = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60).stdout
    key = re.search(r"^l2_\S+$", printed, re.MULTILINE)
    assert key
    accounts = ApiKeyAuthenticator(api_keys_file(tmp_path / "keys.yaml", printed.splitlines()[-1].strip()))
    assert accounts.authenticate(bearer(key[0])) == Account("42", "Alice")
