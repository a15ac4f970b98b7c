"""Find phrases that plain technical English does not use; `make check` runs it over the whole repository.

    python -m tools.prose                      # the rate of hits per 1,000 words, and which phrases
    python -m tools.prose --list server tests  # each place, in these folders or files only

It reads docstrings, comments and messages of Python files, and the prose of Markdown, protos, C++, YAML, TOML and Make
files that git tracks. The phrases follow the rules for English in CONTRIBUTING.md. Well-known projects have 0.2 to
0.8 hits per 1,000 words. The exit status is 1 if the rate is above `MAX_HITS_PER_1000_WORDS`.
"""

import argparse
import collections
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

MAX_HITS_PER_1000_WORDS = 1.0
# Not our prose: licences, lock files, measurements, generated data, and the texts that the demo model was trained on.
SKIP = re.compile(
    r"(\.lock$|results/|LICENSE|\.json$|\.svg$|constraints|tools/demo_model/.*\.txt$|/demo/|tools/prose\.py$|model-card)"
)
PHRASES = {
    "anew -> again": r"\banew\b",
    "archaic word": r"\b(for ever|hinders?|besides|beside|shall|whom|whoever|meanwhile|under way|at hand|in vain)\b",
    "to be had -> available": r"\b(to be had|be had)\b",
    "of ours, of its own -> our, custom, dedicated": (
        r"\bof (ours|theirs|yours|hers|our own|its own|their own|your own)\b"
    ),
    "is none, is no X -> is not a X": r"\b(is|are|was|be) (none|no [a-z]+)\b",
    "who as a subject -> name the role": (r"(^|[.,;:(] )Who [a-z]+s\b|\b(of|for|to|by|from|refuse|tells?) who [a-z]+"),
    "people for software -> name the role": r"\b(nobody|everybody|anybody|somebody|he|him)\b",
    "those that -> a noun": (r"\b[Tt]hose (that|who|which|of|under|there|whose|it|are|for|in|to)\b|\bone that\b"),
    "software that hears, tells, says -> returns, reports, logs": (
        r"\b(hears?|heard)\b|\b(log|line|message|schema|comment|README|metrics?|status|header|context|card|report|file"
        r"|test|flag|seed|name|trailers?|server|settings?|page|class|record) (says?|tells?|said)\b"
    ),
    "as it lies, stands, comes": r"\bas (it|they) (comes?|lies?|stands?|is|are|was|were)\b",
    "so many, so long for a quantity": (
        r"\bso (many|long|much|few) (tokens|threads|rows|chunks|weights|query|requests|of|a|bytes|accounts|was)\b"
        r"|after so long|for so long"
    ),
    "whatever, whichever": (r"\b(whatever (its|the|it|way|order|pieces|comes|becomes)|in whatever|in whichever)\b"),
    "but for, all but": r"\bbut for\b|\ball but\b",
    "metaphor for the queue": r"\b(in line|the line|waiting line|seat|places? in|house|flights?)\b",
    "goes on, lets go, gives up, hands on": (
        r"\b(goes? on|went on|lets? go|gives? up|given up|hand(s|ed)? (on|over))\b"
    ),
    "is to, are to for a duty -> must": r"\b(is|are) to [a-z]+\b",
    "What-clause as a title -> a noun phrase": r"(^|\"\"\"|[.;] |# |\| )What [a-z]+ ",
    "Where-clause as a condition -> If": (
        r"(^|\"\"\"|[.;] |# |, )[Ww]here (it|there|the|they|that|none|both|several|not|one|others) "
    ),
}
# Matches that are plain English here, each with the reason.
ALLOWED = {
    r"\bhouse\b": "the demo model's stories have houses",
}


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that people read, each with its number."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    if path.suffix == ".py":
        yield from _python_prose(text)
    elif path.suffix == ".md":
        yield from _markdown_prose(text)
    elif path.suffix in {".proto", ".cpp", ".hpp"}:
        for number, line in enumerate(text.splitlines(), 1):
            if "//" in line:
                yield number, line.split("//", 1)[1]
    elif path.suffix in {".yaml", ".yml", ".tpl", ".lua", ".toml", ".txt"} or path.name in {"Makefile", "Dockerfile"}:
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.search(r"(?:#|--) (.*)", line):
                yield number, match[1]


def _python_prose(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        number = token.start[0]
        if token.type == tokenize.COMMENT and not token.string.startswith("#!"):
            yield number, token.string.lstrip("# ")
        elif token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)) and " " in token.string:
            for offset, line in enumerate(token.string.splitlines()):
                yield number + offset, line


def _markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def hits_of(line: str) -> Iterator[tuple[str, str]]:
    """Yield the label and the matched text of each unusual phrase in a line."""
    for label, pattern in PHRASES.items():
        for match in re.finditer(pattern, line):
            if not any(re.search(allowed, match[0]) for allowed in ALLOWED):
                yield label, match[0].strip()


def main() -> None:
    """Print the rate and the phrases; exit with 1 if the rate is too high."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["."], help="Folders or files; the whole repository by default.")
    parser.add_argument("--list", action="store_true", help="Print each place.")
    options = parser.parse_args()
    names = subprocess.check_output(["git", "ls-files", "--", *options.paths], text=True).splitlines()
    words, hits = 0, collections.Counter[str]()
    for name in names:
        if SKIP.search(name) or not Path(name).is_file():
            continue
        for number, line in prose_of(Path(name)):
            words += len(line.split())
            for label, text in hits_of(line):
                hits[label] += 1
                if options.list:
                    print(f"{name}:{number}: {label}: {text!r}")
    rate = 1000 * hits.total() / max(words, 1)
    for label, count in hits.most_common():
        print(f"{count:5d}  {label}")
    print(f"{words} words, {hits.total()} hits, {rate:.1f} per 1,000 words (at most {MAX_HITS_PER_1000_WORDS})")
    sys.exit(rate > MAX_HITS_PER_1000_WORDS)


if __name__ == "__main__":
    main()
