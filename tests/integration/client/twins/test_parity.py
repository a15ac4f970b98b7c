"""`SyncClient` has the methods, parameters and defaults of `Client`, and so have the chats and streams."""

from __future__ import annotations

import inspect
import re

import pytest

from llama2_client import Chat, Client, ReplyStream, SyncChat, SyncClient, SyncReplyStream

SYNC_NAMES = {
    "aclose": "close",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}
TYPES = {"Chat": "SyncChat", "ReplyStream": "SyncReplyStream", "AsyncIterator": "Iterator"}
TWINS = [(Client, SyncClient), (Chat, SyncChat), (ReplyStream, SyncReplyStream)]


def members(kind: type) -> dict[str, object]:
    """Return the public members of a class and its special methods, without the ones of `object`."""
    found = {name: value for base in reversed(kind.__mro__[:-1]) for name, value in vars(base).items()}
    inherited = set(dir(object)) | {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__del__"}
    return {
        name: value
        for name, value in found.items()
        if name == "__init__" or (name not in inherited and (not name.startswith("_") or name.endswith("__")))
    }


def in_sync(annotation: object) -> str:
    """Return an annotation of the async class as the synchronous class has it."""
    return re.sub(r"\w+", lambda word: TYPES.get(word[0], word[0]), str(annotation))


def parameters(function: object) -> list[tuple[str, object, object, str]]:
    """Return the name, the kind, the default and the annotation of each parameter, and the result's annotation."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    rows = [(p.name, p.kind, p.default, in_sync(p.annotation)) for p in signature.parameters.values()]
    return [*rows, ("return", None, None, in_sync(signature.return_annotation))]


@pytest.mark.parametrize(("asynchronous", "synchronous"), TWINS)
def test_the_twins_have_the_same_members(asynchronous: type, synchronous: type) -> None:
    """The synchronous class has each public member of the async class, and no other one."""
    assert {SYNC_NAMES.get(name, name) for name in members(asynchronous)} == set(members(synchronous))


@pytest.mark.parametrize(("asynchronous", "synchronous"), TWINS)
def test_the_twins_have_the_same_parameters(asynchronous: type, synchronous: type) -> None:
    """Each method has the same parameters, defaults and annotations, and properties stay properties."""
    ours = members(synchronous)
    for name, member in members(asynchronous).items():
        twin = ours[SYNC_NAMES.get(name, name)]
        assert isinstance(twin, property) == isinstance(member, property), name
        created_by_clients_only = (asynchronous, name) == (ReplyStream, "__init__")
        if callable(member) and not created_by_clients_only:
            assert parameters(twin) == parameters(member), name
            assert not inspect.iscoroutinefunction(twin), name


@pytest.mark.parametrize("kind", [kind for twins in TWINS for kind in twins])
def test_every_public_member_is_documented(kind: type) -> None:
    """Every public method and property has a docstring."""
    assert all(getattr(kind, name).__doc__ for name in members(kind) if not name.startswith("_"))
