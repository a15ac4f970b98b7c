"""A Markdown table of the results and the goals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.models import (
    SHAPES,
    cache_bytes_per_token,
    multiplications_per_token,
    weight_bytes,
    weight_bytes_per_token,
)

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table: name, value derived from the results, format, and goal."""

    name: str
    value: "Callable[[DerivedMetrics], float]"
    value_format: str
    goal: str = ""


class DerivedMetrics:
    """Values derived from the results; accessing a part that was not measured raises KeyError."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._shape = SHAPES[results["about"]["shape"]]

    def speed(self, part: str) -> float:
        """Return the tokens per second of a part."""
        return float(self._results[part]["tokens_per_second"])

    def ceiling(self, name: str) -> float:
        """Return a device limit in bytes or multiplications per second."""
        return float(self._results["ceilings"][f"{name}_per_second"])

    def service_seconds(self, name: str) -> float:
        """Return a duration of the service in seconds."""
        return float(self._results["service"][f"{name}_seconds"])

    @property
    def roofline(self) -> float:
        """Tokens per second of a step that only reads the weights."""
        return self.ceiling("read_bytes") / weight_bytes_per_token(self._shape)

    def efficiency(self, name: str) -> float:
        """Share of the read bandwidth, given the weights and the average number of cached tokens that a step reads."""
        part = self._results[name]
        tokens = part["prompt_tokens"] + part["new_tokens"] / 2
        read = weight_bytes_per_token(self._shape) + tokens * cache_bytes_per_token(self._shape)
        return float(self.speed(name) * read / self.ceiling("read_bytes"))

    def ratio(self, part: str, base: str) -> float:
        """Return the speed of a part, divided by that of another."""
        return self.speed(part) / self.speed(base)

    def start_beyond_load(self, start: str) -> float:
        """Return the seconds of the first or second start without those that created the weights."""
        return self.service_seconds(f"{start}_start") - self.service_seconds(f"{start}_load")

    @property
    def engine_thread_share(self) -> float:
        """Processor time of the engine's thread while the service streams one reply, as a share of one core."""
        return float(self._results["service"]["engine_thread_share"])

    @property
    def cached_load_seconds(self) -> float:
        """Seconds to load all of the weights from the page cache, by the measured speed."""
        return weight_bytes(self._shape) / float(self._results["loading"]["cached_load"])

    @property
    def prefill_efficiency(self) -> float:
        """Share of the rate of a large matmul."""
        part = self._results["prefill"]
        multiplications = multiplications_per_token(self._shape) * part["prompt_tokens"] / part["first_token_seconds"]
        return float(multiplications / self.ceiling("half_multiply_adds"))

    @property
    def loading_efficiency(self) -> float:
        """Share of the speed of a plain read."""
        return float(self._results["loading"]["load"] / self._results["loading"]["read"])


ONE_ROW = "one row"
FUSED = "one row, fused"
TRANSFORMERS = "transformers.generate"
TRANSFORMERS_STATIC = "transformers.generate, static cache and compile"
COMPILED = "compiled step"
ROWS = (
    Row("read bandwidth", lambda m: m.ceiling("read_bytes") / 1e12, "{:.2f} TB/s"),
    Row("copy bandwidth, read plus write", lambda m: m.ceiling("copy_bytes") / 1e12, "{:.2f} TB/s"),
    Row("float16 matmul rate", lambda m: m.ceiling("half_multiply_adds") * 2 / 1e12, "{:.0f} TFLOP/s"),
    Row("roofline of a step", lambda m: m.roofline, "{:.0f} tokens/s"),
    Row("engine only, one row", lambda m: m.speed(ONE_ROW), "{:.1f} tokens/s"),
    Row("engine only / roofline", lambda m: m.speed(ONE_ROW) / m.roofline, "{:.0%}"),
    Row("engine only / roofline with KV cache", lambda m: m.efficiency(ONE_ROW), "{:.0%}", "90% (H200: 88%)"),
    Row("same, fused kernels", lambda m: m.efficiency(FUSED), "{:.0%}", "90% (H200: 88%)"),
    Row("12-bit weights / roofline", lambda m: m.speed("one row, 12 bits") / m.roofline, "{:.2f}", "1.10 (H200: 1.08)"),
    Row("default request / greedy", lambda m: m.ratio("one row, sampled", ONE_ROW), "{:.2f}", "0.99"),
    Row("same, fused kernels", lambda m: m.ratio("one row, sampled, fused", FUSED), "{:.2f}", "0.99"),
    Row("engine only / transformers.generate", lambda m: m.speed(ONE_ROW) / m.speed(TRANSFORMERS), "{:.2f} x", "3 x"),
    Row(
        "engine only / transformers.generate, static cache and compile",
        lambda m: m.speed(ONE_ROW) / m.speed(TRANSFORMERS_STATIC),
        "{:.2f} x",
        "1.1 x",
    ),
    Row("engine only / compiled step", lambda m: m.speed(ONE_ROW) / m.speed(COMPILED), "{:.2f} x"),
    Row("service over gRPC", lambda m: m.speed("service"), "{:.1f} tokens/s"),
    Row("service / engine only", lambda m: m.speed("service") / m.speed(ONE_ROW), "{:.3f}", "0.97"),
    Row("long context / roofline with KV cache", lambda m: m.efficiency("long context"), "{:.0%}", "85%"),
    Row("same, fused kernels", lambda m: m.efficiency("long context, fused"), "{:.0%}", "85%"),
    Row("rows at once / one row", lambda m: m.ratio("rows at once", ONE_ROW), "{:.1f} x", "12 x"),
    Row("same, fused kernels", lambda m: m.ratio("rows at once, fused", FUSED), "{:.1f} x", "12 x"),
    Row("prefill / matmul rate", lambda m: m.prefill_efficiency, "{:.0%}", "70%"),
    Row("time to first token, idle service", lambda m: m.service_seconds("first_token") * 1e3, "{:.1f} ms", "12 ms"),
    Row("engine thread while streaming", lambda m: m.engine_thread_share, "{:.0%} of a core", "15% of a core"),
    Row(
        "slot release after a cancellation, p99",
        lambda m: m.service_seconds("slot_release") * 1e3,
        "{:.1f} ms",
        "a step + 5 ms",
    ),
    Row("loading / plain read", lambda m: m.loading_efficiency, "{:.2f}", "0.5"),
    Row("all weights from the page cache", lambda m: m.cached_load_seconds, "{:.1f} s", "2.5 s"),
    Row("first start beyond the load", lambda m: m.start_beyond_load("first"), "{:.1f} s", "40 s"),
    Row("second start beyond the load", lambda m: m.start_beyond_load("second"), "{:.1f} s", "8 s"),
)
KERNEL_TABLES = {
    "kernels, matmuls": ("name", "variant", "kind"),
    "kernels, matmuls of a step": ("kind",),
    "kernels, attention": ("rows", "context", "kind"),
    "kernels, sampling": ("rows", "sampled", "kind"),
    "kernels, steps": ("rows", "sampled", "kind"),
}
"""The results of the part `kernels`, and what their lines tell apart."""


def report(results: Results) -> str:
    """Return the report as Markdown; a value whose parts were not measured is marked as such."""
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}, {about['processor']}, {versions}; random weights of shape {about['shape']}",
        "",
        *(_test_line(name, results.get(name)) for name in ("tests", "memcheck", "racecheck")),
        *_step_lines(results),
        "",
        "| | measured | goal |",
        "|---|---|---|",
        *(f"| {row.name} | {_format(row, results)} | {row.goal} |" for row in ROWS),
    ]
    for name, columns in KERNEL_TABLES.items():
        if name in results:
            lines += ["", *_kernel_table(name, columns, results[name])]
    if "profile" in results:
        lines += ["", *_profile_table(results["profile"])]
    for part, text in results.get("failures", {}).items():
        lines += ["", f"{part} failed: {text.strip().splitlines()[-1]}"]
    return "\n".join(lines)


def _format(row: Row, results: Results) -> str:
    try:
        return row.value_format.format(row.value(DerivedMetrics(results)))
    except KeyError:
        return "not measured"


def _profile_table(profile: Mapping[str, Any]) -> list[str]:
    step, kernels = profile["step_seconds"], profile["kernels"]
    gaps = step - sum(kernel["seconds"] for kernel in kernels)
    rows = []
    for kernel in kernels[:12]:
        name, runs, seconds = kernel["name"][:60], kernel["runs"], kernel["seconds"]
        rows.append(f"| `{name}` | {runs:.0f} | {seconds * 1e6:.0f} us | {seconds / step:.1%} |")
    return [
        f"One step of one row takes {step * 1e3:.2f} ms under the profiler:\n",
        "| kernel | runs | time | share |",
        "|---|---|---|---|",
        *rows,
        f"| gaps between the kernels | | {gaps * 1e6:.0f} us | {gaps / step:.1%} |",
    ]


def _test_line(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"- {name}: not run"
    counts = [f"{found['passed']} passed", f"{len(found['failed'])} failed", f"{found['skipped']} skipped"]
    if found["sanitizer_findings"] is not None:
        counts.append(f"{found['sanitizer_findings']} findings")
    return f"- {name}: {', '.join(counts)}" + ("" if found["complete"] else "; not complete")


def _step_lines(results: Results) -> list[str]:
    """Say how the engine computed its steps: if the custom kernels could not be built, in plain torch."""
    names = {"steps": "step runner", "fused steps": "step runner, fused"}
    return [f"- {name}: {results[part]['kind']}" for name, part in names.items() if part in results]


def _kernel_table(name: str, columns: tuple[str, ...], found: list[Mapping[str, Any]]) -> list[str]:
    head = [*columns, "time"] + (["TB/s"] if "bytes_per_second" in found[0] else [])
    lines = [f"{name.capitalize()}:\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in found:
        cells = [str(one[column]) for column in columns] + [f"{one['seconds'] * 1e6:.1f} us"]
        if "bytes_per_second" in one:
            cells.append(f"{one['bytes_per_second'] / 1e12:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
