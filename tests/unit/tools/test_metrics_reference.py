"""The metrics reference in docs/telemetry.md."""

from tools.metrics_reference import BEGIN, END, PAGE, with_table


def test_table_of_metrics_is_fresh() -> None:
    """docs/telemetry.md lists the current metrics; otherwise run `python -m tools.metrics_reference`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == with_table(page)
