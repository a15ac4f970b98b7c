"""A Triton kernel that starts a step: slots and positions from the host's table, and the last tokens' embeddings."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_server.engine.cuda.step_runner import COLUMNS, POSITION, SLOT

BLOCK = 1024


@triton.jit
def _embedding_kernel(
    table,  # (rows, COLUMNS) float64
    last_ids,  # (slots,) int64
    embedding,  # (vocab_size, hidden_size)
    x,  # (rows, hidden_size)
    slots, positions,  # (rows,) int64
    hidden_size,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr, POSITION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copy a part of the embedding of one row's last token; the first part also stores slot and position."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(table + row * COLUMNS + SLOT).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    mask = at < hidden_size
    value = tl.load(embedding + tl.load(last_ids + slot) * hidden_size + at, mask=mask)
    tl.store(x + row * hidden_size + at, value, mask=mask)
    if part == 0:
        tl.store(slots + row, slot)
        tl.store(positions + row, tl.load(table + row * COLUMNS + POSITION).to(tl.int64))


def embed(
    table: Tensor, last_ids: Tensor, embedding: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:  # (rows, COLUMNS), (slots + 1,), (vocab_size, hidden_size)
    """Return the embeddings of each row's last token, (rows, hidden_size), slots (rows,) and positions (rows,).

    `cuda/step_runner.py` defines the columns of the table; `options` come from `launch_options`.
    """
    rows, hidden_size = table.shape[0], embedding.shape[1]
    x = embedding.new_empty((rows, hidden_size))
    slots, positions = (torch.empty(rows, dtype=torch.int64, device=table.device) for _ in range(2))
    _embedding_kernel[(rows, triton.cdiv(hidden_size, BLOCK))](
        table, last_ids, embedding, x, slots, positions, hidden_size,
        COLUMNS=COLUMNS, SLOT=SLOT, POSITION=POSITION, BLOCK=BLOCK, num_warps=4, **options,
    )  # fmt: skip
    return x, slots, positions
