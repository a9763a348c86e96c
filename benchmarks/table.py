"""What every benchmark of Atoll prints, and writes as JSON."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. peer: the same work done by a peer or at a physical limit, in *unit*, or a published figure;
    limit: what *value* (or, for unit "×", the ratio) must not exceed."""

    name: str
    value: float
    unit: str
    peer: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        return None if self.limit is None else self.value <= self.limit


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def report(benchmark: str, seed: int, packages: Sequence[str], rows: Sequence[Row], file: Path | None) -> None:
    """Print the table, and write it to *file* as JSON."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    table = Table("what", "value", "unit", "peer", "limit", "met", "", title=benchmark, title_justify="left")
    for row in rows:
        met = {True: "yes", False: "NO", None: "–"}[row.met]
        table.add_row(row.name, _shown(row.value), row.unit, _shown(row.peer), _shown(row.limit), met, row.note)
    console = Console(width=140)
    console.print(table)
    console.print(f"seed {seed}, " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    if file is not None:
        content = {
            "benchmark": benchmark,
            "seed": seed,
            "versions": versions,
            "rows": [{**asdict(row), "met": row.met} for row in rows],
        }
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(benchmark: str, packages: Sequence[str], measure: Callable[[bool], list[Row]], seed: int = 0) -> None:
    """Parse ``--quick`` and ``--json FILE``, measure, report."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}")
    parser.add_argument("--quick", action="store_true", help="a smaller version, within 50 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    arguments = parser.parse_args()
    report(benchmark, seed, packages, measure(arguments.quick), arguments.json)
