"""The texts of the made checkpoint: each token has one successor, or two with fixed logits.

The names are tokens of the tokenizer in `tokenizer/`, where `▁` is a leading space. The successor depends only on the
last token, so each token occurs at most once in all texts. A token without a successor ends the sequence.
"""

from dataclasses import dataclass

END = "</s>"


@dataclass(frozen=True, slots=True)
class Fork:
    """A token with two possible successors, each of which returns to it; `likely` has the higher logit."""

    trigger: str
    likely: str
    unlikely: str
    likely_logit: float
    unlikely_logit: float


def _bytes(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def _words(text: str) -> list[str]:
    return [f"▁{word}" for word in text.split()]


CHAT = [*_words("There lived a happy fairy near the moon"), *_bytes("😀"), *_words("and danced")]
"""The reply to every chat prompt, whose last token is `]`."""

LOOP = _words(
    "story night morning letter door garden forest river castle windows kitchen blanket wind music clock lamp bread"
    " table mirror island train shadow button feather"
)
"""An endless text; a raw prompt that ends with `always` starts it."""

RAW = {
    "▁count": _words("one two three seven hundred twice"),
    "▁poet": ["▁rose", "<0x0A>", "▁thorn", "<0x09>", "▁leaves"],
    "▁coin": [*_bytes("€"), "▁gold"],
    "▁snow": [*_bytes("ж"), "▁cold"],
    "▁tall": [*_bytes("你"), "▁tree"],
    "▁cook": [*_bytes("é"), "▁soup"],
    "▁king": [*_bytes("א"), "▁crown"],
    "▁broke": ["<0xFF>", "▁glass"],
    "▁half": ["▁moment", "<0xC5>"],
    "▁space": ["▁", "▁star"],
}
"""The rest of a raw prompt that ends with the key."""

FORKS = [
    Fork("▁either", "▁left", "▁right", 4.0, 3.5),
    Fork("▁both", "▁high", "▁deep", 4.0, 2.0),
]


def successors() -> dict[str, str]:
    """Return the only successor of each token outside the forks.

    Raises:
        ValueError: a token occurs in two texts.
    """
    found: dict[str, str] = {}
    chains = [("]", [*CHAT, END]), *((key, [*text, END]) for key, text in RAW.items())]
    chains += [("▁always", LOOP), (LOOP[-1], LOOP[:1])]
    chains += [(one, [fork.trigger]) for fork in FORKS for one in (fork.likely, fork.unlikely)]
    for first, rest in chains:
        for token, following in zip([first, *rest], rest, strict=False):
            if token in found:
                raise ValueError(f"script: {token} has two successors; use another token")
            found[token] = following
    return found
