"""Measurements that only a service allows: start-up, and the second turn of a chat."""

import random
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engines.service import Service
from benchmarks.measurement.disturbance import Measurement, measure_undisturbed
from benchmarks.measurement.interleaved_runs import Environment
from benchmarks.prompts import Prompts
from llama2_client import Message

# Digits, about one token each; the chat template adds some tokens.
FIRST_TURN_DIGITS, REPLY_DIGITS, SECOND_TURN_DIGITS = 1_400, 40, 60
BLOCK_BYTES = 4 * 2**20


def start_up(environment: Environment) -> Measurement:
    """Measure the seconds from exec to SERVING for a first and a later start, and of one read of the weight files."""

    def measure() -> Measurement:
        started_at = time.perf_counter()
        _read_weights(environment.checkpoint)
        read_seconds = time.perf_counter() - started_at
        with TemporaryDirectory() as data_directory:
            first, later = (_start_seconds(environment.checkpoint, Path(data_directory)) for _ in range(2))
        return {"read_seconds": round(read_seconds, 3), "first_start_seconds": first, "later_start_seconds": later}

    _read_weights(environment.checkpoint)  # so that both read the files from the page cache
    return measure_undisturbed(measure, attempts=environment.attempts)


def second_turn(environment: Environment, service: Service) -> Measurement:
    """Measure the time to first token of a second turn, once after the first turn and once without it."""
    prompts = Prompts(environment.checkpoint, random.SystemRandom().getrandbits(32))

    def measure() -> Measurement:
        chats = []
        for _ in range(2):
            first, reply, second = map(prompts.digits, (FIRST_TURN_DIGITS, REPLY_DIGITS, SECOND_TURN_DIGITS))
            chats.append([Message("user", first), Message("assistant", reply), Message("user", second)])
        cold = service.first_token_seconds(chats[0])
        service.first_token_seconds(chats[1][:1])
        warm = service.first_token_seconds(chats[1])
        return {"cold_seconds": round(cold, 4), "warm_seconds": round(warm, 4)}

    return measure_undisturbed(measure, attempts=environment.attempts)


def _start_seconds(checkpoint: Path, data_directory: Path) -> float:
    with closing(Service(checkpoint, context_length=3072, slots=1, data_directory=data_directory)) as service:
        return round(service.start_seconds, 3)


def _read_weights(checkpoint: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
