"""How many guesses of each sequence a step checks."""

from collections.abc import Callable, Sequence

MIN_GAIN = 1.03  # in tokens per second: a smaller expected gain is not worth a possible loss


def draft_lengths(chances: Sequence[Sequence[float]], cost: Callable[[int], float], max_rows: int) -> list[int]:
    """Return the number of guesses of each sequence that gives the most tokens per second.

    Args:
        chances: for each sequence, the chance of each guess; they do not increase within a sequence.
        cost: the cost of a step by its number of rows, in any unit. Each sequence needs one row without a guess.
        max_rows: rows of the step, all sequences together. With more sequences, no guess is checked.
    """
    sequences = len(chances)
    guesses = [(chance, index) for index, row in enumerate(chances) for chance in row]
    guesses.sort(key=lambda guess: -guess[0])  # stable: the first guess of a sequence stays before the next one
    tokens, taken, best = float(sequences), 0, MIN_GAIN * sequences / cost(sequences)
    for count, (chance, _) in enumerate(guesses[: max(0, max_rows - sequences)], start=1):
        tokens += chance
        rate = tokens / cost(sequences + count)
        if rate > best:
            taken, best = count, rate
    lengths = [0] * sequences
    for _, index in guesses[:taken]:
        lengths[index] += 1
    return lengths
