"""The report and the charts, made from sample results."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from benchmarks.report import write_report
from benchmarks.reporting.charts import draw_svg
from benchmarks.reporting.goals import evaluate_goals
from benchmarks.reporting.metrics import decode_speed, median, ratio, select, select_decoding
from benchmarks.reporting.tables import report_lines
from benchmarks.results import add, load, new_results, read, save
from tests.unit.benchmarks.sample_results import generation, sample_results

SVG = "{http://www.w3.org/2000/svg}"


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down from round to round changes the medians but not the ratios."""
    measurements = select_decoding(sample_results(), "1.2b")
    assert median(select(measurements, contender="service"), decode_speed) == pytest.approx(5.0)
    assert ratio(measurements, "service", "llama.cpp F16", decode_speed) == pytest.approx(1.6)
    assert ratio(measurements, "service", "unknown", decode_speed) is None


def test_goals() -> None:
    """Each goal has its value, whether it is met or not."""
    found = {goal.description: (goal.reached, goal.met) for goal in evaluate_goals(sample_results())}
    assert found == {
        "decode speed of the service / llama.cpp F16, 1.2B": ("1.60 x", True),
        "decode speed of the service / the fastest peer, llama.cpp F16, 1.2B": ("1.60 x", True),
        "decode speed of the service / engine only, 1.2B": ("1.00 x", True),
        "time to first token of the service minus engine only": ("20 ms", True),
        "decode speed of the service, default request / greedy, 1.2B": ("0.90 x", False),
        "decode speed of the engine / reading its weights at 16 bits, 1.2B": ("0.80 x", False),
        "prefill speed of the service / llama.cpp F16, 512 tokens": ("1.40 x", False),
        "throughput of 8 requests / 1 request, engine only": ("8.00 x", True),
        "throughput of 8 requests / 1 request, service": ("8.00 x", True),
        "first start, from exec to SERVING": ("4.5 s", False),
        "later start, from exec to SERVING": ("3.5 s", True),
        "time to first token of a second turn, with / without the first turn (1,500 tokens)": ("10.0%", True),
    }


def test_report_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and charts need only the results file."""
    path = tmp_path / "run.json"
    save(sample_results(), path)
    write_report(path)
    text = (tmp_path / "run.md").read_text()
    assert text in capsys.readouterr().out
    assert "| **our service**, over gRPC | float16 | 5.0 | 1.00 x | 520 ms | 5.6 | 0.90 x |" in text
    assert "| llama.cpp F16 | float16 | 3.1 | 1.60 x | 1,000 ms | 3.1 | 1.00 x |" in text
    assert "Greedy replies that equal our engine's: llama.cpp F16 0 of 3." in text
    assert "| llama.cpp F16 | 1,400 ms | 1.40 x |" in text
    assert "| our engine only | 10.0 | 20.0 | 80.0 |" in text
    assert "- OpenVINO bf16: not installed: openvino" in text
    assert f"{len(sample_results()['measurements'])} measurements are kept. 0 more were discarded" in text
    assert (tmp_path / "run.svg").exists()


def test_report_counts_disturbed_measurements() -> None:
    """Discarded attempts and contended measurements are counted."""
    results = sample_results()
    results["measurements"] = [
        generation("speed", "service", 0, 1.0, 2.0, discarded=[0.2, 0.4]),
        generation("speed", "service", 1, 1.0, 2.0, discarded=[0.2, 0.4, 0.3, 0.1], contended=True),
    ]
    text = "\n".join(report_lines(results))
    assert "2 measurements are kept. 6 more were discarded" in text
    assert "1 kept measurements were disturbed at the last attempt" in text


def test_charts_name_every_engine() -> None:
    """The SVG is well-formed XML for any names, each chart names every engine, and no text is outside the figure."""
    root = ET.fromstring(draw_svg(sample_results()))  # noqa: S314 - our own
    elements = list(root.iter(f"{SVG}text"))
    texts = ["".join(element.itertext()) for element in elements]
    charts = 4  # bars, two by prompt length, one by requests
    for name in ("our service", "our engine only", "llama.cpp F16"):
        assert texts.count(name) == charts
    assert "A <made-up> processor & its twin" in texts
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert all(0 <= float(element.get("x", 0)) <= width for element in elements)
    assert all(0 <= float(element.get("y", 0)) <= height for element in elements)


def test_charts_are_reproducible() -> None:
    """Equal results give equal bytes, so a diff of the committed SVG shows changed measurements only."""
    assert draw_svg(sample_results()) == draw_svg(sample_results())


def test_new_measurements_replace_old_ones_of_the_same_part(tmp_path: Path) -> None:
    """Measurements with other peers, models and parts stay."""
    results = sample_results()
    before = len(results["measurements"])
    add(results, [generation("speed", "service", 0, 1.0, 2.0, group="transformers.generate")])
    assert len(results["measurements"]) == before + 1
    add(results, [generation("speed", "service", 0, 1.0, 2.0)])
    assert len(select(results["measurements"], part="speed", group="llama.cpp F16")) == 1
    save(results, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == results


def test_results_of_another_machine_are_rejected(tmp_path: Path) -> None:
    """A file with another date or machine raises ValueError."""
    path = tmp_path / "run.json"
    results = new_results(threads=2)
    save(results, path)
    assert load(path, threads=2) == results
    with pytest.raises(ValueError, match="name another file with --results"):
        load(path, threads=3)


@pytest.mark.parametrize(("processor", "goal"), [("Intel Xeon", "1.40 x"), ("AMD EPYC", "1.20 x")])
def test_goals_depend_on_the_processor(processor: str, goal: str) -> None:
    """Processors differ in how close to the memory's speed the peers come."""
    results = sample_results()
    results["machine"]["processor"] = processor
    (found,) = (one for one in evaluate_goals(results) if "fastest peer" in one.description)
    assert found.target == f"at least {goal}"


def test_measurements_without_a_kind_of_request_are_greedy(tmp_path: Path) -> None:
    """Files from before the default request was measured keep their tables."""
    results = sample_results()
    results["measurements"] = [
        {key: value for key, value in one.items() if key != "request"}
        for one in results["measurements"]
        if one.get("request") != "default" or one["part"] != "speed"
    ]
    save(results, tmp_path / "run.json")
    found = read(tmp_path / "run.json")
    assert {one["request"] for one in select_decoding(found, "1.2b")} == {"greedy"}
