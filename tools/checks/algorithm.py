"""Keep ALGORITHM_VERSION in step with the sources that decide the bits of a text.

`tests/unit/engine/fingerprint/algorithm.json` has the version and a digest of these sources, without comments and
docstrings. After a change, raise ALGORITHM_VERSION and run this program. If no result can differ in any bit, run it
with `--same-bits` instead.
"""

import argparse
import ast
import hashlib
import io
import json
import re
import tokenize
from pathlib import Path

from llama2_server.engine.fingerprint.execution import ALGORITHM_VERSION

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "server" / "llama2_server" / "engine"
STORED = ROOT / "tests" / "unit" / "engine" / "fingerprint" / "algorithm.json"
SOURCES = ("sampling.py", "step_runner.py", "model/*.py", "text/*.py", "cuda/*.py", "native/**/*.[ch]pp")
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


def digest() -> str:
    """Return the SHA-256 of the sources, in hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ENGINE.glob(pattern)):
        content = path.read_text(encoding="utf-8")
        code = _python(content) if path.suffix == ".py" else _cpp(content)
        total.update(f"{path.relative_to(ENGINE).as_posix()} {hashlib.sha256(code.encode()).hexdigest()}\n".encode())
    return total.hexdigest()


def problem() -> str | None:
    """Return the reason why the stored version and digest are out of date, and how to fix it; None if they are not."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    if stored == {"version": ALGORITHM_VERSION, "sources": digest()}:
        return None
    if stored["version"] != ALGORITHM_VERSION:
        return "ALGORITHM_VERSION has changed; run python -m tools.checks.algorithm"
    return (
        "sources that decide the bits of a text have changed, and both versions would have one fingerprint; "
        "raise ALGORITHM_VERSION in engine/fingerprint/execution.py and run python -m tools.checks.algorithm, or if no "
        "result can differ in any bit, run python -m tools.checks.algorithm --same-bits"
    )


def main() -> None:
    """Store the version and the digest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same-bits", action="store_true", help="no result differs in any bit")
    same_bits = parser.parse_args().same_bits
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    current = {"version": ALGORITHM_VERSION, "sources": digest()}
    if current != stored and stored.get("version") == ALGORITHM_VERSION and not same_bits:
        raise SystemExit(problem())
    STORED.write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")


def _python(content: str) -> str:
    """Return the lines of code, without comments and docstrings."""
    lines = content.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(content)):
        # A text that stands alone computes nothing: it is a docstring, also that of an attribute.
        if isinstance(node, ast.Expr) and _is_text(node.value) and node.end_lineno is not None:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _cpp(content: str) -> str:
    """Return the code without comments and with single spaces."""
    return " ".join(_COMMENT.sub(lambda match: match[1] or " ", content).split())


if __name__ == "__main__":
    main()
