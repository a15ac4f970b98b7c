"""A request's claim on a slot of the request queue, and the slot in use."""

import asyncio
import math
from dataclasses import dataclass

from llama2_server.errors import ServiceError


@dataclass(frozen=True, slots=True, eq=False)
class SlotLease:
    """A slot in use."""

    queue_seconds: float
    """Time in the queue."""
    started_at: float
    """When the slot was granted, by the event loop's clock."""


class Reservation:
    """A request's claim on a slot; only the `RequestQueue` that created it changes it."""

    __slots__ = ("account_id", "confirmed_at", "decided", "displaces", "error", "granted")

    def __init__(self, account_id: str, *, displaces: bool) -> None:
        self.account_id = account_id
        self.displaces = displaces
        """Whether it is not in the queue yet, and displaces another request when it is confirmed."""
        self.confirmed_at = math.inf
        """When it began to wait, by the event loop's clock; before, no slot is granted to it."""
        self.granted = False
        """Whether it has a slot."""
        self.error: ServiceError | None = None
        """Why the queue rejected it."""
        self.decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the reservation has a slot or an error."""

    def reject(self, error: ServiceError) -> None:
        """End the wait with an error."""
        self.error = error
        if not self.decided.done():
            self.decided.set_result(None)

    @property
    def ready(self) -> bool:
        """Whether a slot can be granted: it is confirmed, and its request has not been cancelled."""
        return self.confirmed_at < math.inf and not self.decided.done()
