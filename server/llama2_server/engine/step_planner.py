"""Which rows a combined step computes: tokens of a prompt, one token of each decoding sequence, and guesses."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.speculation.draft_lengths import draft_lengths
from llama2_server.engine.speculation.drafter import NO_DRAFT, Draft, Drafter
from llama2_server.engine.speculation.row_costs import RowCosts

# A prompt advances by at least this number of tokens per step, however long others wait. The native decoder has room
# for them next to one row of each slot (MIN_PROMPT_ROWS of decoder.hpp).
MIN_PROMPT_ROWS = 16
# With guesses a step has at most this number of rows; more cost almost as much as they can gain.
MAX_GUESSING_ROWS = 16


@dataclass(frozen=True, slots=True)
class StepPolicy:
    """How a combined step divides its rows."""

    prompt_lookup: bool = True
    """Guess tokens from earlier text, and check several of them in one step."""
    max_mixed_step_seconds: float = 0.1
    """Expected time of a step with prompt tokens while others decode; the prompt gets MIN_PROMPT_ROWS in any case."""


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The rows of a decoding sequence: its last token, and then guesses of the next ones."""

    sequence: Sequence
    guesses: SequenceOf[int] = ()
    draft: Draft = NO_DRAFT
    """All guesses of the sequence; `guesses` is its first part."""


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one combined step."""

    prompt: Sequence | None = None
    chunk: SequenceOf[int] = ()
    """Tokens of the prompt, from the sequence's position on."""
    decoding: SequenceOf[DecodeRows] = field(default_factory=list)

    @property
    def completes_prompt(self) -> bool:
        """Whether the chunk is the last of its prompt, so that the step samples the first token of the reply."""
        return self.prompt is not None and self.prompt.position + len(self.chunk) == len(self.prompt.prompt_ids)

    @property
    def rows(self) -> int:
        """Number of rows of the step, guesses included."""
        return len(self.chunk) + sum(1 + len(rows.guesses) for rows in self.decoding)

    @property
    def guesses(self) -> int:
        """Number of guesses that the step checks."""
        return sum(len(rows.guesses) for rows in self.decoding)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get tokens, in the order of `NativeStepRunner.run`."""
        return self.sequences if self.completes_prompt else [rows.sequence for rows in self.decoding]

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of the step, the one of the prompt first."""
        return [*([self.prompt] if self.prompt else []), *(rows.sequence for rows in self.decoding)]


class StepPlanner:
    """Plans the steps of an engine, and learns what rows cost.

    Args:
        policy: how rows are divided.
        max_rows: number of rows that a step can have.
        chunk_tokens: maximum number of prompt tokens in a step.
        end_ids: tokens that end a sequence.
    """

    def __init__(self, policy: StepPolicy, *, max_rows: int, chunk_tokens: int, end_ids: frozenset[int]) -> None:
        self._policy = policy
        self._max_rows = max_rows
        self._chunk_tokens = min(chunk_tokens, max_rows)
        self._end_ids = end_ids
        self._costs = RowCosts()

    def plan(self, prompt: Sequence | None, decoding: list[Sequence]) -> Step | None:
        """Return the next step of a prompt and the decoding sequences, or None without work."""
        if prompt is None:
            return Step(decoding=self._with_guesses(decoding)) if decoding else None
        chunk = prompt.prompt_ids[prompt.position :][: self._prompt_rows(len(decoding))]
        # A prompt needs the rows more than guesses do.
        return Step(prompt, chunk, [DecodeRows(sequence) for sequence in decoding])

    def learn(self, step: Step, tokens: SequenceOf[SequenceOf[TokenOrError]], seconds: float) -> None:
        """Learn from a finished step: its duration, and the tokens of its sequences, as from `NativeStepRunner.run`."""
        self._costs.observe(step.rows, seconds)
        for rows, found in zip(step.decoding, tokens[step.completes_prompt :], strict=True):
            if rows.sequence.drafter is not None:
                rows.sequence.drafter.learn(rows.draft, [token for token in found if isinstance(token, int)])

    def _prompt_rows(self, decoding: int) -> int:
        """Return how many prompt tokens fit into a step next to this number of decoding sequences."""
        if decoding == 0:
            return self._chunk_tokens
        within = self._costs.rows_within(self._policy.max_mixed_step_seconds) - decoding
        return min(max(within, MIN_PROMPT_ROWS), self._chunk_tokens, self._max_rows - decoding)

    def _with_guesses(self, decoding: list[Sequence]) -> list[DecodeRows]:
        if not self._policy.prompt_lookup:
            return [DecodeRows(sequence) for sequence in decoding]
        drafts = [self._draft(sequence) for sequence in decoding]
        if not any(draft.token_ids for draft in drafts):
            return [DecodeRows(sequence) for sequence in decoding]
        lengths = draft_lengths([draft.chances for draft in drafts], self._costs.relative, MAX_GUESSING_ROWS)
        return [
            DecodeRows(sequence, draft.token_ids[:length], draft)
            for sequence, draft, length in zip(decoding, drafts, lengths, strict=True)
        ]

    def _draft(self, sequence: Sequence) -> Draft:
        if sequence.drafter is None:
            sequence.drafter = Drafter([*sequence.prompt_ids, *sequence.output_ids], self._end_ids)
        # The step itself gives one more token; guesses beyond the last allowed one are useless.
        return sequence.drafter.guess(sequence.params.max_tokens - sequence.requested - 1)
