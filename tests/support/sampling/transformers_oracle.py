"""Next-token probabilities by transformers' logits processors, the reference for the samplers."""

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama2_server.engine.sampling import GenerationParams

PROMPT = [1, 2, 2, 3]
HISTORY = [2, 4, 4]  # generated so far


def processors(params: GenerationParams) -> LogitsProcessorList:
    """Return the processors that transformers' `generate` uses for these parameters, in its order."""
    chain = LogitsProcessorList()
    if params.temperature > 0:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain


def expected_probabilities(params: GenerationParams, logits: Tensor, history: list[int]) -> Tensor:
    """Return next-token probabilities, (vocab_size,), by transformers.

    OpenAI's formula adds the frequency and presence penalties, which transformers does not have.
    """
    ids = torch.LongTensor([PROMPT + history])
    scores = logits.double()[None]
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(history, dtype=torch.long), minlength=len(logits))
    scores = scores - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty
    return processors(params)(ids, scores).softmax(-1)[0]
