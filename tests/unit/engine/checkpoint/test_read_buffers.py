"""Tests of the buffers between a file and the device; streams and events of CUDA are recorded stand-ins."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2_server.engine.checkpoint import read_buffers
from llama2_server.engine.checkpoint.files import TensorEntry
from llama2_server.engine.checkpoint.read_buffers import PACKED_BUFFER_BYTES, ReadBuffers, reader_threads

BLOCKS = 5


class RecordedCuda:
    """Stand-ins for pinned memory, streams and events of CUDA that record their use."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.streams = 0
        self.events = 0
        self.pinned = 0
        self.current: int | None = None
        self._empty = torch.empty
        patch.setattr(torch, "empty", self.empty)
        patch.setattr(torch.cuda, "Stream", self.stream)
        patch.setattr(torch.cuda, "stream", self.use)
        patch.setattr(torch.cuda, "Event", self.event)

    def empty(self, *size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        """Count pinned buffers; return pageable memory."""
        self.pinned += pin_memory
        return self._empty(*size, **options)

    def stream(self, device: torch.device) -> int:
        """Create a stream, a number here."""
        self.streams += 1
        return self.streams

    @contextmanager
    def use(self, stream: int | None) -> Iterator[None]:
        """Make a stream the current one."""
        self.current = stream
        yield
        self.current = None

    def event(self, blocking: bool) -> "RecordedEvent":
        """Create an event."""
        assert blocking
        self.events += 1
        return RecordedEvent(self, self.events)


class RecordedEvent:
    """An event that records the order of its calls, and the stream of each."""

    def __init__(self, cuda: RecordedCuda, number: int) -> None:
        self._cuda = cuda
        self._number = number

    def record(self) -> None:
        """Record the event on the current stream."""
        self._cuda.calls.append(f"record {self._number} on stream {self._cuda.current}")

    def synchronize(self) -> None:
        """Wait for the event."""
        self._cuda.calls.append(f"wait {self._number}")


def test_each_reader_copies_from_pinned_memory_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer is written again only after the device has copied it; the other buffer is read into in the meantime."""
    monkeypatch.setattr(read_buffers, "BUFFER_BYTES", 64)
    cuda = RecordedCuda(monkeypatch)
    expected = torch.arange(BLOCKS * 32, dtype=torch.float16)
    for stream in (1, 2):
        cuda.calls.clear()
        buffers = ReadBuffers(torch.device("cuda"))
        destination = torch.zeros(BLOCKS * 32, dtype=torch.float16)
        content: Any = BytesIO(expected.numpy().tobytes())
        assert buffers.fill(destination, torch.float16, BufferedReader(content))
        assert torch.equal(destination, expected)
        first, second = 2 * stream - 1, 2 * stream
        order = [first, second, first, second, first]
        assert cuda.calls == [
            call for event in order for call in (f"wait {event}", f"record {event} on stream {stream}")
        ]
    assert (cuda.streams, cuda.pinned) == (2, 4)


@pytest.mark.parametrize(("width", "group_rows"), [(1000, 1), (1000, 16), (2**16, 16), (2**18, 16)])
def test_blocks_have_whole_groups_of_rows(tmp_path: Path, width: int, group_rows: int) -> None:
    """Only the last block may end inside a group; 16 of the widest rows are larger than a buffer."""
    path, outputs = tmp_path / "tensor", 37 if width > 1000 else 1500
    stored = torch.arange(outputs * width, dtype=torch.int32).to(torch.int16).view(outputs, width)
    path.write_bytes(b"junk" + stored.numpy().tobytes())
    tensor = TensorEntry(path, torch.float16, (outputs, width), 4)
    found, next_row = [], 0
    with path.open("rb") as file:
        file.seek(4)
        for first, rows in ReadBuffers(torch.device("cpu")).read_rows(tensor, file, group_rows):
            assert first == next_row
            assert first % group_rows == 0
            assert rows.nbytes <= max(PACKED_BUFFER_BYTES, group_rows * width * rows.itemsize)
            next_row += len(rows)
            found.append(rows.clone())
    assert torch.equal(torch.cat(found).view(torch.int16), stored)


def test_four_threads_read_to_a_gpu() -> None:
    """A CPU has two, one per memory page writer."""
    assert [reader_threads(torch.device(name)) for name in ("cuda", "cpu")] == [4, 2]
