"""What a start imports: whoever lists studies, or waits for one, does not wait for what few studies need."""

from __future__ import annotations

import subprocess
import sys

LATER = {
    "torch", "numba", "sklearn", "dp_accounting", "matplotlib", "pandas", "tenseal", "selenium", "xgboost", "onnx",
    "scipy.fft", "scipy.linalg", "scipy.optimize", "scipy.signal", "scipy.sparse", "scipy.special", "scipy.stats",
}  # fmt: skip
START = """
import sys
import atoll.cli.main
from atoll.runtime.catalogue import load_installed

load_installed()
print(*sys.modules)
"""


def test_what_few_studies_need_is_imported_later() -> None:
    """Of every command, with every program; scipy's parts load themselves when they are used (``scipy.stats.t``)."""
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"atoll.runtime.serve", "atoll.privacy.dp.release", "atoll.models.trees", "numpy"} <= imported
    assert imported.isdisjoint(LATER)
