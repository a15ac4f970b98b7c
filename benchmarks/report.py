"""Write the report of a results file: tables as Markdown and charts as SVG, without measuring anything.

python -m benchmarks.report benchmarks/results/FILE.json
"""

import argparse
from pathlib import Path

from benchmarks.reporting.charts import draw_svg
from benchmarks.reporting.tables import report_lines
from benchmarks.results import read


def write_report(path: Path) -> None:
    """Write FILE.md and FILE.svg next to FILE.json, and print the former."""
    results = read(path)
    text = "\n".join(report_lines(results)) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    path.with_suffix(".svg").write_text(draw_svg(results), encoding="utf-8")
    print(f"\n{text}")


def main() -> None:
    """Write the report of the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file with the measurements")
    write_report(parser.parse_args().results)


if __name__ == "__main__":
    main()
