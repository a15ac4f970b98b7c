"""Who reads a sequence's tokens in these tests."""

from concurrent.futures import Future

from llama2_server.engine.sequence import SequenceResult


class Reader:
    """Keeps a sequence's tokens; `stop_at` ends it at so many of them, as a stop sequence would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.finish: Future[SequenceResult] = Future()
        self._stop_at = stop_at

    def on_token(self, token_id: int) -> bool:
        """Keep it."""
        self.token_ids.append(token_id)
        return len(self.token_ids) == self._stop_at

    def on_finish(self, finish: SequenceResult) -> None:
        """Keep it."""
        self.finish.set_result(finish)

    def result(self) -> SequenceResult:
        """Wait for the end."""
        return self.finish.result(timeout=60)
