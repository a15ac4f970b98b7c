"""Receipts from the service to `llama2 verify`: saved with a reply, checked offline, and checked by a replay."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.client.cli.command import run
from tests.support.repository import ROOT
from tests.support.scripted_model import scripted_fingerprint
from tests.support.service import ServiceMaker, with_config

from llama2.v1 import model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_client.receipts import read_public_key, receipt_document, verify_receipt
from llama2_client.reply import Reply
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.receipts.keys import public_file, write_new_key

TEXT = "Once upon a time, a fox 🦊 lived by the sea."
NO_SERVER = "127.0.0.1:1"
NODE = shutil.which("node")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Return the file of a new key."""
    file = tmp_path / "receipts.key"
    write_new_key(file)
    return file


@pytest.mark.parametrize("flags", [(), ("--no-stream", "--json")], ids=str)
async def test_a_saved_receipt_is_verified_offline(
    serve_scripted: ServiceMaker, key: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """The natural path: generate with --save-receipt, and verify without the server; a changed text is refused."""
    file, public = tmp_path / "story.receipt", public_file(key)
    async with serve_scripted(TEXT, receipt_key=key) as service:
        made = await run(service.address, "generate", "a story", "--seed", "7", "--save-receipt", str(file), *flags)
    assert made.code == 0, made.err
    found = await run(NO_SERVER, "verify", str(file), "--public-key", str(public), "--json")
    assert found.code == 0, found.err
    statement = json.loads(found.out)
    assert statement["valid"] is True
    assert (statement["seed"], statement["account"]) == (7, "anonymous")
    assert statement["fingerprint"] == scripted_fingerprint("scripted").value
    document = json.loads(file.read_text())
    assert (document["response"], document["request"]) == (TEXT, {"prompt": "a story", "seed": "7"})
    file.write_text(json.dumps(document | {"response": TEXT + "!"}))
    refused = await run(NO_SERVER, "verify", str(file), "--public-key", str(public))
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == f"llama2: not verified: {file}: response: is not the text of this receipt\n"


async def test_a_replay_compares_texts(serve_scripted: ServiceMaker, key: Path, tmp_path: Path) -> None:
    """A server with the receipt's fingerprint must give the text; another one is not compared."""
    file = tmp_path / "story.receipt"
    verify = ("verify", str(file), "--public-key", str(public_file(key)), "--replay")
    async with serve_scripted(TEXT, receipt_key=key) as service:
        await run(service.address, "generate", "a story", "--stop", "xyz", "--save-receipt", str(file))
        equal = await run(service.address, *verify)
        assert (equal.code, equal.err) == (0, "")
        assert "the text is equal" in equal.out
        assert service.model.prefills == 2
    async with serve_scripted("Another text.", receipt_key=key) as service:
        differs = await run(service.address, *verify)
        assert (differs.code, differs.err) == (
            1,
            "llama2: replayed: the texts differ, although the fingerprints are equal\n",
        )
    async with serve_scripted(TEXT, fingerprint=scripted_fingerprint("other")) as service:
        other = await run(service.address, *verify)
        assert (other.code, other.out) == (1, "")
        assert "llama2: not replayed: the server has the fingerprint " in other.err


async def test_every_reply_has_a_receipt(serve_scripted: ServiceMaker, key: Path, demo_card: ModelCard) -> None:
    """Both RPCs and cached replies have valid receipts, with the price that was paid."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    async with serve_scripted(TEXT, card=card, receipt_key=key) as service:
        request = pb.GenerateRequest(prompt="a story", temperature=0.1)
        first = await service.text.Generate(request)
        again = await service.text.Generate(request)
        *deltas, last = [part async for part in service.text.GenerateStream(request)]
    replies = [(first.response, first.completion), (again.response, again.completion)]
    replies.append(("".join(part.response for part in deltas), last.completion))
    public = read_public_key(public_file(key))
    for text, completion in replies:
        document = receipt_document(Reply.from_proto(text, completion, request))
        statement = verify_receipt(document, [public])
        assert str(statement.neurons) == completion.usage.neurons
        assert statement.request_id == completion.request_id
        assert statement.output_tokens == completion.usage.output_tokens
    assert [completion.usage.neurons == "0" for _, completion in replies] == [False, True, True]


async def test_the_card_lists_old_keys(serve_scripted: ServiceMaker, key: Path, tmp_path: Path) -> None:
    """After a change of the key, GetModelCard lists the new one first, and then those in the directory."""
    directory = tmp_path / "public"
    directory.mkdir()
    shutil.copy(public_file(key), directory)
    new = tmp_path / "new.key"
    write_new_key(new)
    async with serve_scripted(TEXT, receipt_key=new, receipt_public_keys=directory) as service:
        response = await service.models.GetModelCard(model_pb2.GetModelCardRequest())
        signed_by = (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).completion.receipt.key_id
    listed = {item.key_id: item.public_key for item in response.receipt_keys}
    assert list(listed.values()) == [read_public_key(public_file(file)) for file in (new, key)]
    assert signed_by == response.receipt_keys[0].key_id


async def test_without_a_key_there_is_no_receipt(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """The reply is printed, and the missing receipt is an error with the reason."""
    file = tmp_path / "story.receipt"
    async with serve_scripted(TEXT) as service:
        result = await run(service.address, "generate", "a story", "--save-receipt", str(file))
        response = await service.models.GetModelCard(model_pb2.GetModelCardRequest())
        completion = (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).completion
        early = await run(service.address, "generate", "a story", "--save-receipt", str(tmp_path / "no/file"))
    assert (result.code, result.out) == (1, f"{TEXT}\n")
    assert result.err.endswith(
        f"llama2: --save-receipt: {file}: the reply has no receipt; the server makes receipts only with --receipt-key\n"
    )
    assert (early.code, early.out) == (2, "")
    assert not completion.HasField("receipt")
    assert not response.receipt_keys


async def test_verify_without_the_extra_names_it(tmp_path: Path) -> None:
    """The base install of the client has no cryptography: the error says what to install."""
    hide = "import sys; sys.modules['cryptography'] = None; from llama2_client.cli.main import main; main()"
    vectors = json.loads((ROOT / "examples/receipts/vectors.json").read_text())
    file, public = tmp_path / "a.receipt", tmp_path / "key.pub"
    file.write_text(json.dumps(vectors["vectors"][0]["document"]))
    public.write_text(vectors["public_keys"][0])
    command = [sys.executable, "-c", hide, "verify", str(file), "--public-key", str(public)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    problem = "needs the packages of the extra `verify`; run pip install '.[verify]' in a clone"
    assert result.stderr == f"llama2: not verified: {file}: {problem}\n"


@pytest.mark.skipif(NODE is None, reason="NOT TESTED: Node.js is not installed")
def test_node_verifies_the_vectors_and_a_document(key: Path, tmp_path: Path) -> None:
    """The program of the documentation needs only Node's own modules."""
    program = ROOT / "examples/receipts/verify.mjs"
    vectors = ROOT / "examples/receipts/vectors.json"
    expected = f"{len(json.loads(vectors.read_text())['vectors'])} vectors are as expected\n"
    check = [str(NODE), str(program), "--vectors", str(vectors)]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stdout == expected
    file = tmp_path / "a.receipt"
    file.write_text(json.dumps(json.loads(vectors.read_text())["vectors"][0]["document"]))
    refused = subprocess.run([str(NODE), program, file, public_file(key)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("not valid: no key has the id ")
