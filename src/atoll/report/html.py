"""Placeholder until the report is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_report(path: Path, result: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    path.write_text("")
