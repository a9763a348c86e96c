"""Writes docs/benchmarks.md from benchmarks' JSON: ``python -m benchmarks.document FILE.json …``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INTRO = """\
# Benchmarks

Each is `python -m benchmarks.NAME [--quick] [--json FILE]`: it prints its table and writes the same as
JSON. Peers and physical limits are measured in the same run, on the same machine, so that the *ratios*
can be compared; a figure quoted from elsewhere says so. On the shared two-core machine that these come from, the
same absolute figure varies by a factor of two between runs (the no-op round: 0.40 to 0.77 ms a site-task; its limit of
0.4 ms is not yet met reliably). The tables are written by
`python -m benchmarks.document FILE.json …`; remarks stand under them.
"""


def number(value: float | None) -> str:
    """Three significant digits, a dash for none."""
    return "–" if value is None else f"{value:.3g}"


def section(result: dict[str, Any]) -> str:
    """One benchmark as Markdown."""
    name = result["benchmark"]
    lines = [f"## {name}", "", f"```\npython -m benchmarks.{name} --json {name}.json\n```", ""]
    lines += ["| what | value | unit | peer | limit | met | note |", "|---|---:|---|---:|---:|---|---|"]
    for row in result["rows"]:
        met = {True: "yes", False: "**no**", None: "–"}[row["met"]]
        cells = [row["name"], number(row["value"]), row["unit"], number(row["peer"]), number(row["limit"]), met]
        lines.append("| " + " | ".join([*cells, row.get("note", "")]) + " |")
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return "\n".join([*lines, "", f"Seed {result['seed']}; {versions}.", ""])


if __name__ == "__main__":
    parts = [section(json.loads(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:]]
    page = Path(__file__).parent.parent / "docs" / "benchmarks.md"
    page.write_text("\n".join([INTRO, *parts]), encoding="utf-8")
