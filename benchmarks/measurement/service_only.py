"""What only a service does: it starts, and it takes up a chat where it was."""

import random
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engines.service import Service
from benchmarks.measurement.disturbance import Figures, measured
from benchmarks.measurement.interleaved_runs import Ground
from benchmarks.prompts import Prompts
from llama2_client import Message

FIRST_TURN, REPLY, SECOND_TURN = 1_400, 40, 60  # digits, about one token each; the template adds some
BLOCK_BYTES = 4 * 2**20


def start_up(ground: Ground) -> Figures:
    """Seconds from exec to SERVING, for the first time and once more, and of reading the weights' files once."""

    def start() -> Figures:
        begun = time.perf_counter()
        _read(ground.checkpoint)
        read = time.perf_counter() - begun
        with TemporaryDirectory() as kept:
            first, again = (_start_seconds(ground.checkpoint, Path(kept)) for _ in range(2))
        return {"read_seconds": round(read, 3), "first_start_seconds": first, "later_start_seconds": again}

    _read(ground.checkpoint)  # both take the files from the system's cache
    return measured(start, attempts=ground.attempts)


def second_turn(ground: Ground, service: Service) -> Figures:
    """Seconds to the first token of a chat's second turn after its first one, and of such a prompt nobody knows."""
    prompts = Prompts(ground.checkpoint, random.SystemRandom().getrandbits(32))

    def turns() -> Figures:
        chats = []
        for _ in range(2):
            first, reply, second = (prompts.digits(count) for count in (FIRST_TURN, REPLY, SECOND_TURN))
            chats.append([Message("user", first), Message("assistant", reply), Message("user", second)])
        cold = service.first_token_seconds(chats[0])
        service.first_token_seconds(chats[1][:1])
        warm = service.first_token_seconds(chats[1])
        return {"cold_seconds": round(cold, 4), "warm_seconds": round(warm, 4)}

    return measured(turns, attempts=ground.attempts)


def _start_seconds(checkpoint: Path, data_directory: Path) -> float:
    with closing(Service(checkpoint, context_length=3072, slots=1, data_directory=data_directory)) as service:
        return round(service.start_seconds, 3)


def _read(checkpoint: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
