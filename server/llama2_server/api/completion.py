"""The completion of a reply, and the fields of a request that decide the reply."""

from datetime import UTC, datetime
from decimal import Decimal

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.sequence import FinishReason
from llama2_server.generation.reply import Reply, ReplyStats
from llama2_server.idempotency.run import KeyedReply
from llama2_server.receipts.keys import ReceiptKeys
from llama2_server.receipts.receipt import Statement, sign
from llama2_server.telemetry.call import CALL
from llama2_server.usage.pricing import decimal_text, neurons

# Fields that change how a reply is sent, but not the reply: receipts do not state them, and calls of one idempotency
# key can change them.
DELIVERY_FIELDS = frozenset(("idempotency_key", "resume_after_characters", "stream", "no_cache"))
_FINISH_REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
}


class Completions:
    """Describes complete replies."""

    def __init__(self, card: ModelCard, fingerprint: Fingerprint, receipt_keys: ReceiptKeys | None) -> None:
        self._card = card
        self._fingerprint = fingerprint
        self._receipt_keys = receipt_keys

    def of(self, request: pb.GenerateRequest, reply: Reply) -> pb.Completion:
        """Return the completion of this call: with an idempotency key, that of the key's first complete reply."""
        stats = reply.stats()
        if isinstance(reply, KeyedReply):
            completion = pb.Completion.FromString(reply.completion)
        else:
            completion = self.describe(request, CALL.get().request_id, stats)
        timings = completion.timings
        timings.queue_time.CopyFrom(duration(stats.queue_seconds))
        timings.time_to_first_token.CopyFrom(duration(stats.time_to_first_token_seconds))
        timings.total_time.CopyFrom(duration(stats.total_seconds))
        return completion

    def describe(
        self, request: pb.GenerateRequest, request_id: str, stats: ReplyStats, *, idempotency_local: bool = False
    ) -> pb.Completion:
        """Return the completion without its timings."""
        price = Decimal(0) if stats.cached else neurons(stats.tokens, self._card.neuron_costs)
        completion = pb.Completion(
            finish_reason=_FINISH_REASONS[stats.finish_reason],
            usage=pb.Usage(
                input_tokens=stats.tokens.input_tokens,
                output_tokens=stats.tokens.output_tokens,
                neurons=decimal_text(price),
                reused_input_tokens=stats.reused_input_tokens,
            ),
            seed=stats.seed,
            cached=stats.cached,
            request_id=request_id,
            fingerprint=self._fingerprint.value,
            idempotency_local=idempotency_local,
        )
        if self._receipt_keys is not None:
            receipt = sign(self._receipt_keys, _statement(request, completion, stats.text))
            completion.receipt.CopyFrom(pb.Receipt(**receipt._asdict()))
        return completion


def compared_fields(request: pb.GenerateRequest) -> dict[str, bytes]:
    """Return each field that is set and decides the reply, by name, in a canonical form."""
    fields = {}
    for field, value in request.ListFields():
        if field.name not in DELIVERY_FIELDS:
            alone = pb.GenerateRequest()
            if field.name in ("messages", "stop"):
                getattr(alone, field.name).extend(value)
            else:
                setattr(alone, field.name, value)
            fields[field.name] = alone.SerializeToString(deterministic=True)
    return fields


def _statement(request: pb.GenerateRequest, completion: pb.Completion, text: str) -> Statement:
    """Return what a receipt states about a reply of this call."""
    fields = MessageToDict(request, preserving_proto_field_name=True)
    return Statement(
        request={name: value for name, value in fields.items() if name not in DELIVERY_FIELDS},
        text=text,
        seed=completion.seed,
        fingerprint=completion.fingerprint or None,
        input_tokens=completion.usage.input_tokens,
        output_tokens=completion.usage.output_tokens,
        neurons=completion.usage.neurons,
        account_id=CALL.get().account_id or "",
        request_id=completion.request_id,
        time=datetime.now(UTC),
    )


def duration(seconds: float) -> Duration:
    """Return the protobuf message of a duration."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
