"""Simulation at scale: how fast many sites are trained on one machine, against plain PyTorch and two peers.

First, a CNN on MNIST at 100 sites with 600 images each, ten of them in each of 50 rounds, one pass in batches of ten
(McMahan et al. 2017, §3: E = 1, B = 10): wall time of a whole process, start-up and the score at the end included, of
the ``local`` transport, of simulated sites in a process a core, of the same steps in a bare PyTorch loop (the physical
limit; the faster of two ways to use all cores), of Flower's simulation and of pfl-research. One after another, in turn,
the median of five; CPU time of processes that end with the contender is in the notes. Peers are installed into
environments of their own under $ATOLL_PEERS (default: a folder for temporary files), which is left for the next time.

Then 1,000 sites of 60 rows in one process on one core, all in each round: sites' steps taken together against the bare
loop site by site, CPU time of rounds after the first, in turn. Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from atoll.contract.plan import Plan
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Round, Summed
from atoll.contract.schema import Column, TableSchema
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.runtime.catalogue import load_installed
from atoll.runtime.serve import settle
from atoll.runtime.simulation import Engine
from atoll.runtime.study import settled
from benchmarks.table import Row, main

SEED = 0
REPEATS = int(os.environ.get("ATOLL_REPEATS", 5))
ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("ATOLL_DATA", ROOT.parent / "shared" / "data")) / "mnist" / "mnist.npz"
PEERS = Path(os.environ.get("ATOLL_PEERS", Path(tempfile.gettempdir()) / "atoll-peers"))
CORES = len(os.sched_getaffinity(0))
TASK: dict[str, Any] = {
    "data": str(DATA), "sites": 100, "per_round": 10, "rounds": 50, "seed": SEED, "channels": [16, 32], "hidden": 128,
    "batch_size": 10, "epochs": 1, "rate": 0.01, "cores": CORES,
}  # fmt: skip
INSTALLED = {"flower": ("flwr[simulation]==1.41.0",), "pfl": ("pfl==0.6.0",)}
ALONE = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
LIMIT, GAIN = 1.25, 0.2


@dataclass(frozen=True, slots=True)
class Ran:
    """One contender once: seconds of wall clock, CPU seconds of it and of its children that ended, test accuracy."""

    wall_s: float
    cpu_s: float
    accuracy: float


class DidNotRun(Exception):
    """Why."""


# ---------------------------------------------------------------- contenders, each a process


def run(command: Sequence[str], task: dict[str, Any], patience_s: float = 7200.0) -> Ran:
    """Run a contender; raises DidNotRun with the end of what it printed, or after *patience_s*."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        environment = {**os.environ, **ALONE, "SIMULATION_TASK": json.dumps(task)}
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
        alarm = threading.Timer(patience_s, child.kill)
        alarm.start()
        _, status, used = os.wait4(child.pid, 0)
        alarm.cancel()
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        lines = out.read().strip().splitlines() or ["nothing was printed"]
    told = [line for line in lines if line.startswith("RESULT ")]
    if child.returncode or not told:
        raise DidNotRun(lines[-1][:150])
    return Ran(wall, used.ru_utime + used.ru_stime, float(json.loads(told[-1][7:])["accuracy"]))


def python(name: str, where: str = sys.executable) -> list[str]:
    """The command of a contender."""
    return [where, "-c", f"import benchmarks.contenders.{name} as contender; contender.main()"]


def installed(peer: str) -> str:
    """The Python of a peer's own environment, which is made if it is not there; raises DidNotRun."""
    home = PEERS / peer
    if not (home / "done").exists():
        print(f"installing {peer} into {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        wanted = [*INSTALLED[peer], f"torch=={torch.__version__.partition('+')[0]}", "numpy"]
        made = subprocess.run([home / "bin" / "pip", "install", "-q", *wanted], capture_output=True, text=True)
        if made.returncode:
            raise DidNotRun(f"pip install {' '.join(wanted)}: {made.stderr.strip().splitlines()[-1][:150]}")
        (home / "done").touch()
    return str(home / "bin" / "python")


def commands(peers: bool) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """By contender: command, and what its task has beside the others'. Raises nothing: a peer that cannot be installed
    has a command that says why."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {
        "bare": (python("bare"), {}),
        "local": (python("atoll_runs"), {"way": "local"}),
        "simulated": (python("atoll_runs"), {"way": "simulated"}),
    }
    for name, module in {"flower": "flower", "pfl": "pfl_research"}.items() if peers else ():
        try:
            where = installed(name)
        except DidNotRun as why:
            found[name] = ([sys.executable, "-c", f"print({str(why)!r}); raise SystemExit(1)"], {})
            continue
        found[name] = (python(module, where), {})
        if name == "pfl" and CORES > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(CORES), "--no-python"]
            found[name] = ([where, *torchrun, *python(module, where)], {})
    return found


def best_way(task: dict[str, Any]) -> str:
    """How the bare loop uses all cores best."""
    if CORES == 1:
        return "processes"
    first = run(python("bare"), {**task, "way": "processes"}).wall_s
    try:
        run(python("bare"), {**task, "way": "threads"}, first)
    except DidNotRun:  # not within that time
        return "processes"
    return "threads"


def contest(quick: bool) -> list[Row]:
    """The CNN at 100 sites."""
    few = {"sites": 20, "per_round": 4, "rounds": 2} if quick else {}
    task, repeats = {**TASK, **few}, 1 if quick else REPEATS
    way = "processes" if quick else best_way({**task, "rounds": 3})
    ran: dict[str, list[Ran]] = {}
    why: dict[str, str] = {}
    for _ in range(repeats):
        for name, (command, own) in commands(not quick).items():
            try:
                if name not in why:
                    ran.setdefault(name, []).append(run(command, {**task, "way": way, **own}))
                    print(name, ran[name][-1], file=sys.stderr, flush=True)
            except DidNotRun as error:
                why[name] = str(error)
                ran.pop(name, None)
                print(f"{name} did not run: {error}", file=sys.stderr, flush=True)
    return [
        *told(ran, way),
        *(Row(f"MNIST: {name}", 0, "s", note=f"did not run: {text}") for name, text in why.items()),
    ]


def told(ran: dict[str, list[Ran]], way: str) -> list[Row]:
    """The contest's rows."""
    notes = {"bare": f"way: {way}", "local": "wire, journals, signatures and ledgers included",
             "simulated": f"simulated sites in {CORES} processes", "flower": "flwr[simulation], an actor a core",
             "pfl": "pfl-research, torchrun"}  # fmt: skip
    rows = []
    for name, runs in ran.items():
        wall, cpu = (statistics.median(getattr(one, what) for one in runs) for what in ("wall_s", "cpu_s"))
        accuracy = statistics.median(one.accuracy for one in runs)
        note = f"accuracy {100 * accuracy:.1f} %, {cpu:.0f} s CPU; {notes[name]}"
        rows.append(Row(f"MNIST, 100 sites, CNN: {name}", wall, "s", note=note))
    for name in ("local", "simulated"):
        for peer in ran.keys() - {"local", "simulated"} if name in ran else ():
            pairs = list(zip(ran[name], ran[peer], strict=False))
            wall = statistics.median(own.wall_s / other.wall_s for own, other in pairs)
            cpu = statistics.median(own.cpu_s / other.cpu_s for own, other in pairs)
            limit = LIMIT if peer == "bare" else 1.0
            note = f"by CPU time {cpu:.2f}" if peer == "bare" else ""
            rows.append(Row(f"MNIST: {name} / {peer}", wall, "×", limit=limit, note=note))
    return rows


# ---------------------------------------------------------------- sites' steps taken together

FEATURES = tuple(f"x{i}" for i in range(20))
TABULAR = TableSchema(
    name="tabular",
    columns={
        **{name: Column(range=(-4, 4)) for name in FEATURES},
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    },
)
LEARNERS: dict[str, dict[str, Any]] = {
    "logistic regression": {"family": "logistic", "features": list(FEATURES)},
    "MLP, 32 units": {"model": {"kind": "mlp", "features": list(FEATURES), "hidden": [32]}},
}


def small_sites(many: int) -> dict[str, Table]:
    """Sites of 60 rows."""
    random, found = np.random.default_rng(SEED), {}
    truth = random.normal(size=len(FEATURES))
    for site in range(many):
        x = random.normal(size=(60, len(FEATURES))).clip(-4, 4)
        y = (x @ truth > random.normal(size=60)).astype(np.float64)
        found[f"site-{site:04d}"] = Table(TABULAR, {**dict(zip(FEATURES, x.T, strict=True)), "y": y})
    return found


class Together:
    """Atoll's simulated sites in one process, by rounds."""

    def __init__(self, learner: dict[str, Any], tables: dict[str, Table], epochs: int) -> None:
        params = {"target": "y", **learner, "local_epochs": epochs, "batch_size": 10, "learning_rate": 0.1}
        plan = settled(Plan.from_json({
            "name": "tabular", "schema": TABULAR.model_dump(mode="json"), "program": "horizontal.fedavg",
            "params": {**params, "rounds": 1000}, "protection": "plain", "cohort": {"min_sites": 1},
            "run": {"evaluate": False},
        }))  # fmt: skip
        self._engine = Engine(plan, {name: SiteData.of(table, plan, name) for name, table in tables.items()})
        self._steps = build(plan.program, plan.params).coordinate(Cohort(tuple(tables), TABULAR))
        self._sites, self._number = tuple(tables), 0
        first: Any = next(self._steps)
        self._asked: Round = first
        self.start = np.asarray(first.send["weights"])

    def round(self) -> float:
        """One round; its mean loss."""
        asked = self._asked
        sent = {name: np.asarray(value) for name, value in asked.send.items()}
        totals, sites = self._engine.total(asked, self._number, self._sites, set(self._sites), sent)
        loss, item = float(totals["loss"] / totals["weight"]), self._steps.send(Summed(totals, sites))
        while not isinstance(item, Round):
            item = self._steps.send(None)
        self._asked, self._number = item, self._number + 1
        return loss


class OneByOne:
    """The bare loop."""

    def __init__(self, learner: dict[str, Any], tables: dict[str, Table], epochs: int, start: NDArray[Any]) -> None:
        """start: weights, [num_weights]; a linear model's begin with the intercept, and are 0."""
        hidden = learner["model"]["hidden"][0] if "model" in learner else 0
        wide = len(FEATURES)
        self._net: nn.Module = nn.Linear(wide, 1)
        if hidden:
            self._net = nn.Sequential(nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self._epochs, self._random = epochs, np.random.default_rng(SEED)
        vector_to_parameters(torch.from_numpy(start.astype(np.float32)), self._net.parameters())
        self._weights = [value.detach().clone() for value in self._net.parameters()]
        self._sites = [
            (torch.from_numpy(np.column_stack([t[n] for n in FEATURES]) / 4).float(),
             torch.from_numpy(t["y"]).float()[:, None])
            for t in tables.values()
        ]  # fmt: skip

    def round(self) -> float:
        """One round; its mean loss."""
        held, total = list(self._net.parameters()), 0.0
        sums = [torch.zeros_like(value) for value in held]
        for x, y in self._sites:
            steps = 0
            with torch.no_grad():
                for value, first in zip(held, self._weights, strict=True):
                    value.copy_(first)
            losses = 0.0
            for _ in range(self._epochs):
                for rows in torch.split(torch.from_numpy(self._random.permutation(len(y))), 10):
                    loss = F.binary_cross_entropy_with_logits(self._net(x[rows]), y[rows])
                    gradients = torch.autograd.grad(loss, held)
                    with torch.no_grad():
                        for value, gradient in zip(held, gradients, strict=True):
                            value.sub_(gradient, alpha=0.1)
                    losses, steps = losses + float(loss.detach()), steps + 1
            total += losses / steps
            with torch.no_grad():
                for one, value in zip(sums, held, strict=True):
                    one += value
        self._weights = [one / len(self._sites) for one in sums]
        return total / len(self._sites)


def together(quick: bool) -> list[Row]:
    """Small models at 1,000 sites."""
    load_installed()
    torch.set_num_threads(1)
    tables, rows = small_sites(50 if quick else 1000), []
    settle()
    for name, learner in LEARNERS.items():
        for epochs in (1, 5):
            ours = Together(learner, tables, epochs)
            sides: dict[str, Together | OneByOne] = {"together": ours}
            sides["bare"] = OneByOne(learner, tables, epochs, ours.start)
            took: dict[str, list[float]] = {side: [] for side in sides}
            loss = {side: one.round() for side, one in sides.items()}  # the first is not measured
            for _ in range(1 if quick else REPEATS):
                for side, one in sides.items():
                    began = time.process_time()
                    loss[side] = one.round()
                    took[side].append(time.process_time() - began)
            ratio = statistics.median(a / b for a, b in zip(took["together"], took["bare"], strict=True))
            each = {side: 1e6 * statistics.median(times) / len(tables) for side, times in took.items()}
            note = (
                f"{1 / ratio:.1f} times as fast; a site's round {each['together']:.0f} µs and {each['bare']:.0f} µs; "
            )
            note += f"mean loss {loss['together']:.3f} and {loss['bare']:.3f}"
            rows.append(Row(f"{len(tables)} sites of 60 rows, {name}, E = {epochs}: together / bare", ratio, "×",
                            limit=GAIN, note=note))  # fmt: skip
    return rows


def measure(quick: bool) -> list[Row]:
    """All of it."""
    return [*together(quick), *contest(quick)]


if __name__ == "__main__":
    main("simulation", ("numpy", "torch"), measure, SEED)
