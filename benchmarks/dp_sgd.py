"""DP-SGD beside Opacus: one step (clipped gradients of each example, noise, update) on logistic regression and a CNN.

Opacus is installed into .venvs/opacus (by pip, when it is not there) and runs in a process of its own. The two take
turns, one thread each, on batches of the same size and networks of the same layers; a ratio is of medians.
Of Opacus's ways, hooks and ghost clipping, the faster one counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atoll.contract.schema import Column, TableSchema
from atoll.models.model import Examples, Model, by_gradients, make
from atoll.runtime.serve import settle
from benchmarks.opacus_steps import NUM_FEATURES
from benchmarks.table import Row, main

SEED = 0
HOME = Path(__file__).parent.parent / ".venvs" / "opacus"
PINS = ("opacus==1.6.0", "torch==2.13.0", "numpy==2.4.6")
CASES = (("linear", 64), ("linear", 256), ("cnn", 64), ("cnn", 256))


class Peer:
    """Opacus in a process of its own."""

    def __init__(self) -> None:
        python = HOME / "bin" / "python"
        if not python.exists():
            venv.create(HOME, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        installed = json.loads(subprocess.check_output([*pip, "list", "--format", "json"], text=True))
        self.versions = {one["name"]: one["version"].partition("+")[0] for one in installed}
        if any(self.versions.get(name) != wanted for name, wanted in (pin.split("==") for pin in PINS)):
            subprocess.run([*pip, "install", "--quiet", *PINS], check=True)
        script = str(Path(__file__).with_name("opacus_steps.py"))
        command = [str(python), "-P", script]  # -P: or this folder's statistics.py hides Python's own
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def steps(self, case: str, mode: str, batch: int, steps: int) -> list[float]:
        """Seconds of each step."""
        to, back = self._process.stdin, self._process.stdout
        if to is None or back is None:
            raise RuntimeError("the peer has no pipes")
        to.write(json.dumps({"case": case, "mode": mode, "batch": batch, "steps": steps}) + "\n")
        to.flush()
        times: list[float] = json.loads(back.readline())
        return times

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def model_of(case: str) -> Model:
    """Logistic regression on NUM_FEATURES columns, or the CNN."""
    columns: dict[str, Any] = {f"x{i}": Column(range=(-1, 1)) for i in range(NUM_FEATURES)}
    columns |= {"image": Column(dtype="image", shape=(28, 28)), "y": Column(dtype="integer", values=(0, 1))}
    schema = TableSchema(name="steps", columns=columns)
    if case == "cnn":
        return by_gradients(make({"kind": "cnn", "image": "image", "target": "y"}, schema))
    features = [f"x{i}" for i in range(NUM_FEATURES)]
    linear = {"kind": "linear", "family": "logistic", "features": features, "target": "y"}
    return by_gradients(make(linear, schema))


def ours(case: str, batch: int, *, private: bool = True) -> Callable[[], None]:
    """One step of Atoll's: what a site computes, noise, and the coordinator's update."""
    random, model = np.random.default_rng(SEED), model_of(case)
    labels = (random.random(batch) < 0.5).astype(np.float64)
    if case == "linear":
        inputs = model.design(random.uniform(-1, 1, (batch, NUM_FEATURES)))  # type: ignore[attr-defined]
    else:
        inputs = random.integers(0, 256, (batch, 28, 28), np.uint8)
    examples, weights = Examples((inputs,), labels), model.initial(SEED)

    def step() -> None:
        nonlocal weights
        if private:
            total = model.clipped_gradient_sum(weights, examples, 1.0)[0] + random.normal(size=len(weights))
            weights = weights - 0.01 * total / batch
        else:
            weights = weights - 0.01 * model.loss_and_gradient(weights, examples)[1]

    return step


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Seconds of each step."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def measure(quick: bool) -> list[Row]:
    """All rows."""
    settle()
    turns, rows, peer = 5 if quick else 15, [], Peer()
    for case, batch in CASES:
        steps = 100 if case == "linear" else 10 if quick else 20
        private, plain = ours(case, batch), ours(case, batch, private=False)
        times: dict[str, list[float]] = {"atoll": [], "plain": [], "hooks": [], "ghost": []}
        for turn in range(turns + 1):
            found = {"atoll": timed(private, steps), "plain": timed(plain, steps)}
            found |= {mode: peer.steps(case, mode, batch, steps) for mode in ("hooks", "ghost")}
            if turn:  # the first warms up
                for name, some in found.items():
                    times[name] += some
        median = {name: statistics.median(some) * 1e3 for name, some in times.items()}
        best = min(median["hooks"], median["ghost"])
        what = f"{'logistic regression' if case == 'linear' else 'CNN'}, batch {batch}"
        note = f"peer: Opacus, hooks {median['hooks']:.3g} ms, ghost clipping {median['ghost']:.3g} ms"
        rows += [
            Row(f"DP-SGD step, {what}", median["atoll"], "ms", best, None, note),
            Row("the same, ratio", median["atoll"] / best, "×", None, 0.2 if case == "linear" else 1.0,
                f"{best / median['atoll']:.1f} times as fast; {median['atoll'] / median['plain']:.2f} × a step without "
                "clipping and noise"),
        ]  # fmt: skip
    peer.close()
    return rows


if __name__ == "__main__":
    main("dp_sgd", ["atoll", "numpy", "torch"], measure, SEED)
