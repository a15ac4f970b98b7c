"""A reader of a sequence's tokens."""

from concurrent.futures import Future

from llama2_server.engine.sequence import SequenceResult


class Reader:
    """A listener that stores tokens; after `stop_at` tokens it ends the sequence, like a stop sequence."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.finish: Future[SequenceResult] = Future()
        self._stop_at = stop_at

    def on_token(self, token_id: int) -> bool:
        """Store the token."""
        self.token_ids.append(token_id)
        return len(self.token_ids) == self._stop_at

    def on_finish(self, result: SequenceResult) -> None:
        """Store the result."""
        self.finish.set_result(result)

    def result(self) -> SequenceResult:
        """Wait until the sequence ends and return its result."""
        return self.finish.result(timeout=60)
