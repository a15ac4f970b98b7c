"""Output of the `llama2` command, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtobufMessage
from grpc_health.v1 import health_pb2

from llama2.v1 import account_pb2, model_pb2, text_generation_pb2
from llama2_client.aio.reply_stream import ReplyStream
from llama2_client.cli.usage_errors import print_error_line
from llama2_client.reply import HealthStatus, Reply, TokenCount

SECONDS_PER_DAY = 86_400
HEALTH_EXIT_CODES: Mapping[HealthStatus, int] = {
    HealthStatus.SERVING: 0,
    HealthStatus.SERVICE_UNKNOWN: 2,
    HealthStatus.NOT_SERVING: 3,
    HealthStatus.UNKNOWN: 3,
}


async def print_stream(stream: ReplyStream, *, as_json: bool) -> None:
    """Stream a reply to standard output, then print its statistics. The stream is closed in every case."""
    async with stream:
        if as_json:
            async for delta in stream:
                _print_json(text_generation_pb2.GenerateStreamResponse(response=delta))
            _print_json(text_generation_pb2.GenerateStreamResponse(completion=stream.reply.completion))
            return
        try:
            async for delta in stream:
                click.echo(delta, nl=False)
        finally:
            if stream.text and not stream.text.endswith("\n"):
                click.echo()
    print_statistics(stream.reply)


async def print_whole(stream: ReplyStream, *, as_json: bool) -> None:
    """Read a reply to its end, then print it and its statistics. The stream is closed in every case."""
    async with stream:
        async for _ in stream:
            pass
    reply = stream.reply
    if as_json:
        _print_json(text_generation_pb2.GenerateResponse(response=reply.text, completion=reply.completion))
    else:
        click.echo(reply.text)
        print_statistics(reply)


def write_receipt(reply: Reply, file: Path) -> None:
    """Write the document of a reply's receipt; exit with an error after the reply if that is not possible."""
    from llama2_client.receipts import ReceiptError, receipt_document  # most calls need no receipt

    try:
        file.write_text(receipt_document(reply), encoding="utf-8")
    except (ReceiptError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        print_error_line(f"--save-receipt: {file}: {reason}")
        raise click.exceptions.Exit(1) from error


def print_statistics(reply: Reply) -> None:
    """Print one line of statistics on standard error, so that standard output has only the text."""
    print_note(" · ".join(_statistics(reply)))


def print_count(count: TokenCount, *, as_json: bool) -> None:
    """Print the number of input tokens and the largest possible number of output tokens."""
    if as_json:
        _print_json(_count_message(count))
    elif count.max_output_tokens > 0:
        click.echo(f"{count.input_tokens} input tokens; at most {count.max_output_tokens} output tokens")
        if forecast := list(_forecast(count)):
            print_note(" · ".join(forecast))
    else:
        click.echo(f"{count.input_tokens} input tokens; too many for the model's context")


def _count_message(count: TokenCount) -> text_generation_pb2.CountTokensResponse:
    message = text_generation_pb2.CountTokensResponse(
        input_tokens=count.input_tokens, max_output_tokens=count.max_output_tokens, requests_left=count.requests_left
    )
    if count.max_neurons is not None:
        message.max_neurons = str(count.max_neurons)
    if count.estimated_queue_time_seconds is not None:
        message.estimated_queue_time.FromNanoseconds(round(count.estimated_queue_time_seconds * 1e9))
    return message


def _forecast(count: TokenCount) -> Iterator[str]:
    if count.max_neurons is not None:
        yield f"at most {count.max_neurons} neurons"
    if count.requests_left is not None:
        yield f"{count.requests_left} requests left in this minute"
    if count.estimated_queue_time_seconds is not None:
        yield f"queue about {count.estimated_queue_time_seconds:.0f} s"


def print_health(status: HealthStatus, *, as_json: bool) -> None:
    """Print the health of a service."""
    if as_json:
        _print_json(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.ServingStatus.Value(status)))
    else:
        click.echo(status.value)


def print_card(card: model_pb2.ModelCard, *, as_json: bool) -> None:
    """Print a summary of the model card, or all of it in protobuf's JSON format."""
    if as_json:
        _print_json(card)
        return
    click.echo(f"{click.style(card.display_name or card.name, bold=True)}  {card.name}")
    if card.description:
        click.echo(card.description)
    click.echo()
    rows = list(_card_rows(card))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{click.style(name.ljust(width), dim=True)}  {value}")


def print_usage(usage: account_pb2.GetUsageResponse, *, as_json: bool) -> None:
    """Print an account's usage as a table, or in protobuf's JSON format."""
    if as_json:
        _print_json(usage)
        return
    quota = usage.quota
    remaining = f"{quota.requests_left} of {quota.max_requests_per_min} requests per minute left"
    resets_in = math.ceil(quota.resets_in.seconds + quota.resets_in.nanos / 1e9)
    click.echo(f"account {usage.account}: {remaining}" + (f"; full again in {resets_in} s" if resets_in else ""))
    if usage.HasField("budget"):
        click.echo(_budget(usage.budget))
    if not usage.days:
        click.echo("no usage on these days")
        return
    header = ("date", "model", "requests", "input tokens", "output tokens", "cached tokens", "neurons")
    rows = [header, *(_usage_row(day) for day in usage.days)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        click.echo("  ".join([*texts, *numbers]))


def print_note(text: str) -> None:
    """Print a message of the program itself on standard error, dimmed."""
    click.secho(text, dim=True, err=True)


def _statistics(reply: Reply) -> Iterator[str]:
    yield reply.finish_reason.value.lower().replace("_", " ")
    reused = f" ({reply.reused_input_tokens} reused)" if reply.reused_input_tokens else ""
    yield f"{reply.input_tokens} in{reused}, {reply.output_tokens} out"
    yield f"{reply.neurons} neurons"
    if reply.cached:
        yield "from the response cache"
        return
    yield f"queue {reply.queue_time_seconds:.2f} s"
    yield f"first token {reply.time_to_first_token_seconds:.2f} s"
    decode_seconds = reply.total_time_seconds - reply.time_to_first_token_seconds
    if reply.output_tokens > 1 and decode_seconds > 0:
        yield f"{(reply.output_tokens - 1) / decode_seconds:.1f} tokens/s"


def _budget(budget: account_pb2.BudgetState) -> str:
    days = math.ceil(budget.resets_in.seconds / SECONDS_PER_DAY)
    spent = f"{budget.neurons_spent} of {budget.neurons_per_month} neurons of this month spent"
    return f"budget: {spent}, {budget.neurons_reserved} reserved; the next month starts in {days} days"


def _usage_row(day: account_pb2.DailyUsage) -> tuple[str, ...]:
    counts = (day.requests, day.input_tokens, day.output_tokens, day.cached_tokens)
    return (day.date, day.model, *(f"{count:,}" for count in counts), day.neurons)


def _card_rows(card: model_pb2.ModelCard) -> Iterator[tuple[str, str]]:
    limits, defaults = card.limits, card.generation_defaults
    if card.task.name:
        yield "task", card.task.name
    if card.tags:
        yield "tags", ", ".join(card.tags)
    yield "context", f"{limits.context_length_limit} tokens, at most {limits.sequence_length_limit} of them generated"
    yield "concurrent requests", f"{limits.max_concurrent_requests}; more requests wait in the queue"
    yield "quota", _quota(card.quota)
    if card.quota.HasField("account_neurons_per_month"):
        yield "budget", f"{card.quota.account_neurons_per_month} neurons per month for this account"
    for price in card.prices:
        yield f"price of {price.metric}", f"{price.neuron_cost} neurons each"
    for field in defaults.DESCRIPTOR.fields:
        yield f"default {field.name}", f"{getattr(defaults, field.name):g}"
    for item in card.properties:
        yield item.property_id, item.value


def _quota(quota: model_pb2.Quota) -> str:
    default = f"{quota.max_requests_per_min} requests per minute"
    if not quota.HasField("account_max_requests_per_min"):
        return default
    return f"{quota.account_max_requests_per_min} requests per minute for this account, {default} by default"


def _print_json(message: ProtobufMessage) -> None:
    """Print a message of the API in protobuf's JSON form, with the original field names, on one line."""
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    click.echo(json.dumps(fields, ensure_ascii=False))
