"""The verification of a decode step: its logits equal the logits of the model in plain torch, except for rounding."""

import torch

from llama2_server.engine.cuda.step_runner import ForwardFunction
from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import LlamaModel

MAX_RELATIVE_ERROR = 0.02  # of the logits compared with plain torch; float16 rounding alone causes a few thousandths
VERIFICATION_TOKENS = 48


def verify_logits(model: LlamaModel, forward: ForwardFunction, tokens: int = VERIFICATION_TOKENS) -> float:
    """Return the relative error of a step's logits after up to `tokens` tokens, compared with the model's own.

    Raises:
        EngineError: the error is too large or not a number.
    """
    # One row and several rows use different kernels.
    errors = [relative_error(model, forward, rows, tokens) for rows in sorted({1, model.slots})]
    if not all(error < MAX_RELATIVE_ERROR for error in errors):  # not max(errors), which can ignore NaN
        raise EngineError(f"logits of the CUDA kernels differ from plain torch by {errors}, limit {MAX_RELATIVE_ERROR}")
    return max(errors)


def relative_error(model: LlamaModel, forward: ForwardFunction, rows: int, tokens: int) -> float:
    """Return the norm of the logits' difference from the model's own logits, divided by the norm of those."""
    slots = list(range(rows))
    prompt = [1 + index % (model.vocab_size - 1) for index in range(min(tokens, model.context_length - 1))]
    for slot in slots:
        model.prefill(slot, prompt[slot % len(prompt) :], 0)
    positions = [len(prompt) - slot % len(prompt) for slot in slots]
    token_ids = [prompt[slot % len(prompt)] for slot in slots]
    expected = model.decode(slots, token_ids, positions).double()  # (rows, vocab_size)
    inputs = [torch.tensor(numbers, device=model.device) for numbers in (token_ids, slots, positions)]
    return float((forward(*inputs).double() - expected).norm() / expected.norm())
