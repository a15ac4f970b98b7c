import itertools
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from benchmarks import report
from benchmarks.reporting.charts import picture
from benchmarks.reporting.goals import goals
from benchmarks.reporting.metrics import decode_speed, decoding, median, ratio, where
from benchmarks.results import add, load, new_results, save
from benchmarks.svg import spread
from tests.unit.benchmarks.sample_results import generation, results


def test_ratios_are_of_one_round() -> None:
    """A machine that slows down from round to round changes the medians, and no ratio."""
    speed = decoding(results(), "1.2b")
    assert median(where(speed, contender="service"), decode_speed) == pytest.approx(5.0)
    assert ratio(speed, "service", "llama.cpp F16", decode_speed) == pytest.approx(1.6)
    assert ratio(speed, "service", "nobody", decode_speed) is None


def test_goals() -> None:
    """Each is told with its number, met or not."""
    found = {goal.what: (goal.found, goal.met) for goal in goals(results())}
    assert found == {
        "service's decode speed to llama.cpp F16, 1.2B": ("1.60 x", True),
        "service's decode speed to the fastest peer, llama.cpp F16, 1.2B": ("1.60 x", True),
        "service's decode speed to the engine's, 1.2B": ("1.00 x", True),
        "service's time to the first token beyond the bare prefill": ("20 ms", True),
        "engine's share of the memory's read bandwidth, 1.2B": ("80%", False),
        "service's prefill of 512 tokens to llama.cpp F16's": ("1.40 x", False),
        "engine: 8 requests at once to one after another": ("8.00 x", True),
        "service: 8 requests at once to one after another": ("8.00 x", True),
        "first start-up, from exec to SERVING": ("4.5 s", False),
        "later start-up, from exec to SERVING": ("3.5 s", True),
        "second turn of a chat of 1,500 tokens: time to first token to the cold one": ("10.0%", True),
    }


def test_report_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and picture come from the file alone."""
    path = tmp_path / "run.json"
    save(results(), path)
    report.write(path)
    text = (tmp_path / "run.md").read_text()
    assert text in capsys.readouterr().out
    assert "| **our service**, over gRPC | float16 | 5.0 | 1.00 x | 520 ms | 3 of 3 |" in text
    assert "| llama.cpp F16 | float16 | 3.1 | 1.60 x | 1,000 ms | 0 of 3 |" in text
    assert "| llama.cpp F16 | 1,400 ms | 1.40 x |" in text
    assert "| our bare engine | 10.0 | 20.0 | 80.0 |" in text
    assert "- OpenVINO bf16: not installed: openvino" in text
    assert f"{len(results()['measurements'])} measurements are kept. 0 more were discarded" in text
    assert (tmp_path / "run.svg").exists()


def test_report_tells_what_was_disturbed() -> None:
    """Discarded attempts and contended measurements are counted."""
    made = results()
    made["measurements"] = [
        generation("speed", "service", 0, 1.0, 2.0, discarded=[0.2, 0.4]),
        generation("speed", "service", 1, 1.0, 2.0, discarded=[0.2, 0.4, 0.3, 0.1], contended=True),
    ]
    text = "\n".join(report.lines(made))
    assert "2 measurements are kept. 6 more were discarded" in text
    assert "1 stayed so at the last attempt" in text


def test_picture_is_well_formed() -> None:
    """It is XML, whatever the names hold, and everyone who was measured is named in each chart."""
    root = ET.fromstring(picture(results()))  # noqa: S314 - our own
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    charts = 4  # bars, two by length, one by requests
    for name in ("our service", "our engine", "llama.cpp F16"):
        assert texts.count(name) == charts
    numbers = [
        float(value) for element in root.iter() for key, value in element.items() if key in ("x", "y", "cx", "cy")
    ]
    assert all(0 <= number <= 900 for number in numbers)


def test_labels_keep_apart() -> None:
    """They touch at most, stay in order, and none moves that has room."""
    assert spread([10.0, 50.0, 90.0], 14, 100) == [10.0, 50.0, 90.0]
    places = spread([10.0, 11.0, 12.0, 30.0, 98.0, 99.0], 14, 100)
    assert places[-1] == 100.0
    assert all(later - earlier >= 14 - 1e-9 for earlier, later in itertools.pairwise(places))


def test_a_part_measured_anew_replaces_the_old_one(tmp_path: Path) -> None:
    """Parts of other peers, models and kinds stay."""
    made = results()
    before = len(made["measurements"])
    add(made, [generation("speed", "service", 0, 1.0, 2.0, group="transformers.generate")])
    assert len(made["measurements"]) == before + 1
    add(made, [generation("speed", "service", 0, 1.0, 2.0)])
    assert len(where(made["measurements"], part="speed", group="llama.cpp F16")) == 1
    save(made, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == made


def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    """Nor are another day's."""
    path = tmp_path / "run.json"
    own = new_results(threads=2)
    save(own, path)
    assert load(path, threads=2) == own
    with pytest.raises(ValueError, match="name another file"):
        load(path, threads=3)
