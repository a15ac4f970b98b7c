"""The page on telemetry and the metrics that there are."""

from tools.metrics_reference import BEGIN, END, PAGE, with_table


def test_table_of_metrics_is_fresh() -> None:
    """docs/telemetry.md lists the metrics as they are; else run `python -m tools.metrics_reference`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == with_table(page)
