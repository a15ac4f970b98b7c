"""A request's claim on a slot of the request queue, and the slot in use."""

import asyncio
import math
from dataclasses import dataclass

from llama2_server.errors import ServiceError


@dataclass(slots=True, eq=False)
class SlotLease:
    """A slot in use."""

    queue_seconds: float
    """Time in the queue."""
    started_at: float
    """When the slot was granted, by the event loop's clock."""
    yields: bool = False
    """Whether its holder frees the slot within one step if another request needs it."""
    unused: bool = False
    """Whether its holder generated nothing in it; its time then does not count."""


Order = tuple[int, int]
"""The place of a request in the queue: its round, and the number of its arrival."""


class Reservation:
    """A request's claim on a slot; only the `RequestQueue` that created it changes it."""

    __slots__ = ("account_id", "confirmed_at", "decided", "displaceable", "displaces", "error", "granted", "order")

    def __init__(self, account_id: str, order: Order, *, displaces: bool, displaceable: bool) -> None:
        self.account_id = account_id
        self.order = order
        self.displaces = displaces
        """Whether it is not in the queue yet, and displaces another request when it is confirmed."""
        self.displaceable = displaceable
        """Whether another request can displace it."""
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
