"""The functions of the server that can fail, by the name of the fault, in the order of the parts of the service."""

import sqlite3
from collections.abc import Callable
from typing import Any

from llama2_server.admission.call_budget import CallBudget
from llama2_server.admission.keys import keys_file
from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.engine.engine import Engine
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.stop_sequences import StopMatcher
from llama2_server.generation.response_cache import MemoryResponseCache
from llama2_server.generation.text_stream import TextStream
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.telemetry import Telemetry
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database

POINTS: dict[str, tuple[Any, str]] = {
    # Order of admission
    "reserving": (RequestQueue, "reserve"),
    "confirming": (RequestQueue, "confirm"),
    "handing the slot on": (RequestQueue, "_grant_next"),
    "updating the mean": (RequestQueue, "_update_mean_hold"),
    "the retry time": (RequestQueue, "add_retry_time"),
    "giving quota back": (Quota, "refund"),
    # A budget for unpaid work
    "the budget of wrong keys": (CallBudget, "take_keyless"),
    "checking the budget": (CallBudget, "check"),
    "the budget of free calls": (CallBudget, "spend"),
    "reading the keys": (keys_file, "read_in_child"),
    "validation": (RequestValidator, "validate_generate"),
    "counting tokens": (RequestValidator, "validate_count_tokens"),
    "reading the response cache": (MemoryResponseCache, "get"),
    "writing the response cache": (MemoryResponseCache, "put"),
    "reading usage": (Ledger, "totals"),
    # Faults inside
    "submitting": (Engine, "submit"),
    "acquiring the KV slot": (PrefixCache, "acquire"),
    "returning the KV slot": (PrefixCache, "release"),
    "decoding a token": (Detokenizer, "decode"),
    "the last text": (Detokenizer, "flush"),
    "the stop matcher": (StopMatcher, "push"),
    "the result": (TextStream, "on_finish"),
    "reporting progress": (Ledger, "progress"),
    "telemetry: start": (Telemetry, "call_started"),
    "telemetry: status": (Telemetry, "call_finished"),
    "telemetry: usage": (Telemetry, "usage_recorded"),
    "telemetry: end": (Telemetry, "call_completed"),
    "telemetry: step": (Metrics, "on_step"),
    # The usage ledger
    "a faulty admission": (statements, "admit"),
    "a faulty progress": (statements, "progress"),
    "the checkpoint": (Database, "checkpoint"),
}
ERRORS: dict[str, Callable[[str], Exception]] = {"the checkpoint": sqlite3.OperationalError}
