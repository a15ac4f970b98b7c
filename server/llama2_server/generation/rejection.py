"""The retry time of a rejected call: when neither the queue nor the quota rejects it again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.retry_times import CallIdentity
from llama2_server.errors import QueueFull, QueueWaitTooLong, QuotaExceeded, QuotaStoreUnavailable


@asynccontextmanager
async def retry_times(
    queue: RequestQueue, quota: Quota, account_id: str, identity: CallIdentity
) -> AsyncIterator[None]:
    """Give an error of the body, for lack of capacity or quota, the time at which neither rejects the call again.

    Raises:
        ResourceExhausted: an error of the body, with its retry time.
    """
    try:
        yield
    except (QueueFull, QueueWaitTooLong, QuotaExceeded) as error:
        now = asyncio.get_running_loop().time()
        if (at := queue.retry_times.of_call(identity.key, now)) is not None:  # a client that calls again too early
            raise error.retry_after(at - now) from None
        earliest = error.retry_after_seconds or 0.0
        limit = quota.limit(account_id)
        with suppress(QuotaStoreUnavailable):  # then the queue's time is the best answer
            earliest = max(earliest, await quota.retry_seconds(account_id))
        seconds = queue.add_retry_time(account_id, identity, earliest, limit, keeps_order=error.keeps_order)
        raise error.retry_after(seconds) from None
