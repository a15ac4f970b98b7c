"""Measure how many weights of a checkpoint fit in 12 bits, without loading it."""

from pathlib import Path

import torch

from llama2_server.engine.checkpoint.files import TensorEntry, read_config
from llama2_server.engine.checkpoint.formats import check_format
from llama2_server.engine.checkpoint.loader import read_checked_table
from llama2_server.engine.checkpoint.read_buffers import ReadBuffers
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.packed_weights import PackedShare, measure_rows
from llama2_server.engine.model.weights import LlamaWeights
from llama2_server.engine.native.library import NativeUnavailable, find_instructions


def measure_checkpoint(directory: Path) -> PackedShare:
    """Read the matrices of a checkpoint and return their share.

    Raises:
        WeightsError: the checkpoint cannot be served, or the native library is not available.
    """
    try:
        find_instructions()
    except NativeUnavailable as error:
        raise WeightsError(f"cannot measure weights: {error}") from error
    check_format(directory)
    config = read_config(directory)
    stored = read_checked_table(directory, config, LlamaWeights.allocate(config, "meta", torch.float16))
    buffers = ReadBuffers(torch.device("cpu"))
    matrices = {name: tensor for name, tensor in stored.items() if len(tensor.shape) == 2}
    return sum((_measure_matrix(name, tensor, buffers) for name, tensor in matrices.items()), PackedShare())


def _measure_matrix(name: str, tensor: TensorEntry, buffers: ReadBuffers) -> PackedShare:
    formats = torch.empty(tensor.shape[0], dtype=torch.int64)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for first, rows in buffers.read_rows(tensor, file):
            if measure_rows(rows, formats[first : first + len(rows)]) is None:
                raise WeightsError(f"{tensor.path}: tensor {name} contains numbers that float16 cannot represent")
    return PackedShare.of(formats, tensor.shape[1])
