"""Errors that are planted into the server: the model must find each of them, or the simulation proves nothing."""

import itertools
import sqlite3
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.fair_queue import FairQueue
from llama2_server.admission.keys import keys_file
from llama2_server.admission.quota_windows import LocalWindows
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.reservation import Order, Reservation
from llama2_server.api import interceptor
from llama2_server.api.health import HealthServicer
from llama2_server.generation.replicas.reply_text import ReplyText
from llama2_server.telemetry.metrics import Metrics
from llama2_server.usage import records
from llama2_server.usage.forwarder import Forwarder
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.local import statements

EVERY = 25
"""An error occurs once in so many times."""

Plant = Callable[[pytest.MonkeyPatch], None]


def _sometimes(original: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count(1)

    def call(*args: Any, **options: Any) -> Any:
        return (original if next(numbers) % EVERY else otherwise)(*args, **options)

    return call


def _replace(owner: Any, name: str, otherwise: Callable[..., Any]) -> Plant:
    return lambda patch: patch.setattr(owner, name, _sometimes(getattr(owner, name), otherwise))


def _always(owner: Any, name: str, value: Any) -> Plant:
    return lambda patch: patch.setattr(owner, name, value)


def _drop_record(connection: sqlite3.Connection, record: Any) -> None:
    connection.execute("DELETE FROM running_requests WHERE request_id = ?", (record.request_id,))


async def _commit_nothing(self: Ledger) -> None:
    pass


async def _delete_first(self: Forwarder, batch: Any) -> None:
    await self._writer.run(lambda connection: statements.delete_forwarded(connection, batch))
    await self._store.upsert(batch)


def _grant_one(self: RequestQueue) -> None:
    self._grant_next()


def _return_at_once(*arguments: Any, **options: Any) -> float:
    return 0.01


def _halve(original: Callable[..., float]) -> Callable[..., float]:
    return lambda *arguments, **options: original(*arguments, **options) / 2


def _serve_one_last(self: FairQueue, account_id: str, kept: Order | None) -> Order:
    order = self.next_order(account_id)
    return (order[0] + 1000, order[1]) if account_id == "a1" else order


def _keep_round(self: FairQueue, reservation: Reservation) -> None:
    self._remove_entries(reservation)


async def _lose_keys(self: ApiKeyAuthenticator) -> None:
    try:
        self._table = keys_file.read(self._path)
    except keys_file.KeysFileError:
        self._table = keys_file.KeyTable({})


def _do_nothing(*arguments: Any) -> None:
    pass


def _allow_one_more(patch: pytest.MonkeyPatch) -> None:
    use = LocalWindows.use
    patch.setattr(LocalWindows, "use", lambda self, account, limit, **options: use(self, account, limit + 1, **options))


def _charge_double(tokens: Any, costs: Any) -> Any:
    return 2 * sum(costs.values())


def _no_statuses(*arguments: Any) -> Any:
    raise RuntimeError("the text of an exception")


class Planted(NamedTuple):
    """An error, and the simulation that finds it."""

    rule: str
    """The start of the name of the rule that the history violates."""
    plant: Plant
    faults: frozenset[str] = frozenset()
    """The faults that show the error."""
    per_minute: int = 600
    accounts: int = 5
    max_queue_size: int = 16
    requests: int = 800
    overload: bool = False
    seed: int = 1


KILLS = frozenset({"SIGKILL", "SIGKILL at completion", "SIGKILL after a commit"})
PLANTED = {
    "a slot is not returned": Planted("slots_are", _replace(RequestQueue, "_release", lambda self: None)),
    "more slots than the card has": Planted(
        "slots_are_limited", _always(RequestQueue, "_grant_free_slots", _grant_one)
    ),
    "a record is dropped": Planted("one_record_per_request", _replace(statements, "finish", _drop_record)),
    "a record is deleted before it is forwarded": Planted(
        "one_record_per_request", _always(Forwarder, "_send", _delete_first), frozenset({"the usage store"})
    ),
    "a record is not durable": Planted(
        "records_are_exact", _always(Ledger, "commit", _commit_nothing), KILLS, requests=1400, seed=2
    ),
    "a wrong price": Planted("records_are_exact", _replace(records, "neurons", _charge_double)),
    "one request more than the quota": Planted("quota_is_never_exceeded", _allow_one_more, per_minute=5),
    "retry times that are too early": Planted(
        "retry_times_are_kept", _always(RequestQueue, "add_retry_time", _return_at_once), overload=True
    ),
    "retry times that are half as long": Planted(
        "retry_times_are_kept",
        _always(RequestQueue, "add_retry_time", _halve(RequestQueue.add_retry_time)),
        overload=True,
    ),
    "an account that is served last": Planted(
        "accounts_share_the_slots", _always(FairQueue, "order", _serve_one_last), requests=1400, overload=True
    ),
    "requests that leave keep their rounds": Planted(
        "accounts_share_the_slots", _always(FairQueue, "remove", _keep_round), accounts=3, requests=1400, overload=True
    ),
    "keys that a faulty reload loses": Planted(
        "keys_are_accepted", _always(ApiKeyAuthenticator, "_reload", _lose_keys), frozenset({"an invalid keys file"})
    ),
    "a reader that is not notified": Planted("every_call_ends", _replace(ReplyText, "notify", lambda self: None)),
    "the text of an exception": Planted("statuses_are_true", _always(interceptor, "_errors_as_statuses", _no_statuses)),
    "a full disk that health does not show": Planted(
        "health_shows_faults", _always(HealthServicer, "set_disk_writable", _do_nothing), frozenset({"a full disk"})
    ),
    "tokens that are not counted": Planted("metrics_are_exact", _replace(Metrics, "usage_recorded", _do_nothing)),
}
