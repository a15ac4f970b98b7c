"""The results as a table beside the goals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.models import SHAPES, cached_a_token, multiplications_a_token, read_a_token

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One figure: what it is, how it follows from the results, how it is written, and the goal."""

    name: str
    value: "Callable[[Figures], float]"
    form: str
    goal: str = ""


class Figures:
    """What follows from the results; KeyError where a part was not measured."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._shape = SHAPES[results["about"]["shape"]]

    def speed(self, part: str) -> float:
        """Tokens a second."""
        return float(self._results[part]["tokens_per_second"])

    def ceiling(self, name: str) -> float:
        """Bytes or multiplications a second."""
        return float(self._results["ceilings"][f"{name}_per_second"])

    def of_service(self, name: str) -> float:
        """Seconds."""
        return float(self._results["service"][f"{name}_seconds"])

    @property
    def roofline(self) -> float:
        """Tokens a second, if a step did nothing but read the weights."""
        return self.ceiling("read_bytes") / read_a_token(self._shape)

    @property
    def long_context_share(self) -> float:
        """Of the read bandwidth, by the weights and the tokens that a step has to read on average."""
        part = self._results["long context"]
        tokens = part["prompt_tokens"] + part["new_tokens"] / 2
        read = read_a_token(self._shape) + tokens * cached_a_token(self._shape)
        return float(self.speed("long context") * read / self.ceiling("read_bytes"))

    @property
    def prefill_share(self) -> float:
        """Of the rate of a large matrix product."""
        part = self._results["prefill"]
        done = multiplications_a_token(self._shape) * part["prompt_tokens"] / part["first_token_seconds"]
        return float(done / self.ceiling("half_multiply_adds"))

    @property
    def loading_share(self) -> float:
        """Of the speed of a plain read."""
        return float(self._results["loading"]["load"] / self._results["loading"]["read"])


ONE, PEER, STATIC = "one row", "transformers.generate", "transformers.generate, static cache and compile"
LINES = (
    Line("read bandwidth", lambda f: f.ceiling("read_bytes") / 1e12, "{:.2f} TB/s"),
    Line("copy bandwidth, both ways", lambda f: f.ceiling("copy_bytes") / 1e12, "{:.2f} TB/s"),
    Line("float16 matrix product", lambda f: f.ceiling("half_multiply_adds") * 2 / 1e12, "{:.0f} TFLOP/s"),
    Line("roofline of a step", lambda f: f.roofline, "{:.0f} tokens/s"),
    Line("bare engine, one row", lambda f: f.speed(ONE), "{:.1f} tokens/s"),
    Line("its share of the roofline", lambda f: f.speed(ONE) / f.roofline, "{:.0%}", "85%"),
    Line("sampled to greedy", lambda f: f.speed("one row, sampled") / f.speed(ONE), "{:.2f}"),
    Line("to transformers.generate", lambda f: f.speed(ONE) / f.speed(PEER), "{:.2f} x", "3 x"),
    Line("the same with static cache and compile", lambda f: f.speed(ONE) / f.speed(STATIC), "{:.2f} x", "1.1 x"),
    Line("service over gRPC", lambda f: f.speed("service"), "{:.1f} tokens/s"),
    Line("service to bare engine", lambda f: f.speed("service") / f.speed(ONE), "{:.3f}", "0.97"),
    Line("long context, share of the roofline with its KV cache", lambda f: f.long_context_share, "{:.0%}", "80%"),
    Line("rows at once to one row", lambda f: f.speed("rows at once") / f.speed(ONE), "{:.1f} x", "10 x"),
    Line("prefill, share of the matrix rate", lambda f: f.prefill_share, "{:.0%}", "50%"),
    Line("time to first token, idle service", lambda f: f.of_service("first_token") * 1e3, "{:.1f} ms", "25 ms"),
    Line("free after a hang-up, p99", lambda f: f.of_service("free_again") * 1e3, "{:.1f} ms", "a step + 5 ms"),
    Line("loading to a plain read", lambda f: f.loading_share, "{:.2f}", "0.5"),
    Line("first start to SERVING", lambda f: f.of_service("first_start"), "{:.1f} s", "60 s beyond the load"),
    Line("second start to SERVING", lambda f: f.of_service("second_start"), "{:.1f} s", "20 s beyond the load"),
)


def report(results: Results) -> str:
    """Markdown; a figure whose parts were not measured says so."""
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}, {about['processor']}, {versions}; random weights of shape {about['shape']}",
        f"\nTests on the GPU: {results.get('tests', 'not run')}\n",
        "| | measured | goal |",
        "|---|---|---|",
        *(f"| {line.name} | {_written(line, results)} | {line.goal} |" for line in LINES),
    ]
    if "profile" in results:
        lines += ["", *_profile(results["profile"])]
    return "\n".join(lines)


def _written(line: Line, results: Results) -> str:
    try:
        return line.form.format(line.value(Figures(results)))
    except KeyError:
        return "not measured"


def _profile(profile: Mapping[str, Any]) -> list[str]:
    step, kernels = profile["step_seconds"], profile["kernels"]
    rest = step - sum(kernel["seconds"] for kernel in kernels)
    rows = []
    for kernel in kernels[:12]:
        name, runs, seconds = kernel["name"][:60], kernel["runs"], kernel["seconds"]
        rows.append(f"| `{name}` | {runs:.0f} | {seconds * 1e6:.0f} us | {seconds / step:.1%} |")
    return [
        f"One step of one row, {step * 1e3:.2f} ms under the profiler:\n",
        "| kernel | runs | time | share |",
        "|---|---|---|---|",
        *rows,
        f"| between the kernels | | {rest * 1e6:.0f} us | {rest / step:.1%} |",
    ]
