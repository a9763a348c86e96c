"""Federated statistics beside pandas: WOE and IV of a million rows and 100 features at three sites, and a table
of ten million rows and 30 columns prepared and described in a gigabyte.

pandas works on the pooled table. Both bin by deciles, count labels a bin, and sum IV. Sites are in this process,
with journals and ledgers on disk; tables are in memory on both sides.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from atoll.contract.plan import Plan
from atoll.contract.schema import TableSchema
from atoll.crypto.identity import Identity
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import Table, concatenate
from atoll.runtime.catalogue import load_installed
from atoll.runtime.coordinator import Coordinator
from atoll.runtime.journal import Journal
from atoll.runtime.policy import Policy
from atoll.runtime.sandbox import run_sandbox
from atoll.runtime.serve import settle
from atoll.runtime.site import Site
from atoll.runtime.store import RunStore
from atoll.transport.local import LocalTransport
from benchmarks.table import Row, main

SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}
SEED = 0


def _same(data: SiteData, _: Plan) -> SiteData:
    return data


def run(plan: Plan, tables: Mapping[str, Table]) -> tuple[dict[str, Any], float, float]:
    """(result, seconds, MB to and from a site on average) of *plan* over the local transport, ledgers included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = RunStore(f"sqlite:///{folder / 'store.db'}", durable=False)
        identity = Identity.generate("coordinator")
        journals, endpoints = [], {}
        for number, (site, table) in enumerate(tables.items()):
            own, data = Identity.generate(site), SiteData.of(table, plan, site)
            store.invite(site, f"{number:064x}", 2**31 - 1)
            store.enrol(site, f"{number:064x}", own.public.hex(), "")
            journals.append(Journal(folder / f"{site}.db", site, own.public, own.sign, temporary=True))
            made = Site(own, journals[-1], Policy.sandbox(), partial(_same, data), identity.public)
            endpoints[site] = made.handle
        transport = LocalTransport(endpoints)
        coordinator = Coordinator(transport, store, store.ledger(identity.public, identity.sign))
        submitted = store.create_run(plan, tuple(tables))
        began = time.perf_counter()
        outcome = asyncio.run(coordinator.run(submitted))
        seconds = time.perf_counter() - began
        wire: Any = store.result(submitted)[0]["wire"]
        transport.close()
        store.close()
        for journal in journals:
            journal.close()
    return outcome["result"], seconds, sum(wire.values()) / len(tables) / 1e6


# ---------------------------------------------------------------- WOE and IV


def credit_tables(num_rows: int, num_features: int) -> dict[str, Table]:
    """Three uneven sites: amounts, ratios and counts, 5% of cells missing, and a label that depends on some of them."""
    random, tables = np.random.default_rng(SEED), {}
    kinds: list[dict[str, Any]] = [
        {"range": [0, 1e6]},
        {"range": [-10, 10]},
        {"dtype": "integer", "range": [0, 100]},
    ]
    columns: dict[str, Any] = {f"x{i}": kinds[i % 3] for i in range(num_features)}
    columns["default"] = {"dtype": "integer", "values": [0, 1], "role": "label"}
    schema = TableSchema.model_validate({"name": "credit", "max_rows": num_rows, "columns": columns})
    for site, share in SHARES.items():
        n, cells = round(num_rows * share), {}
        risk = np.full(n, -2.0)
        for i in range(num_features):
            hidden = random.normal(share, 1, n)
            drawn = (np.exp(8 + hidden), hidden * 1.5, np.floor(20 + 10 * hidden))[i % 3]
            risk += hidden * (0.3 / (1 + i))
            cells[f"x{i}"] = np.clip(drawn, *kinds[i % 3]["range"])
            cells[f"x{i}"][random.random(n) < 0.05] = np.nan
        cells["default"] = (random.random(n) < 1 / (1 + np.exp(-risk))).astype(np.float64)
        tables[site] = Table(schema, cells)
    return tables


def pandas_iv(bins: pd.Series, label: pd.Series) -> float:
    """Information value of binned cells (missing ones are a bin), with 0.5 added to both counts where one is 0."""
    counts = pd.crosstab(bins.cat.add_categories("missing").fillna("missing"), label).astype(float)
    counts += 0.5 * (counts == 0).any(axis=1).to_numpy()[:, None]
    share = counts / label.value_counts().sort_index()
    return float(((share[0] - share[1]) * np.log(share[0] / share[1])).sum())


def difference(features: Mapping[str, Any], pooled: pd.DataFrame) -> float:
    """The largest relative difference of IV from pandas' at the reported edges."""
    worst = 0.0
    for name, found in features.items():
        edges = [-np.inf, *(part["to"] for part in found["bins"][:-1]), np.inf]
        wanted = pandas_iv(pd.cut(pooled[name], edges), pooled["default"])
        worst = max(worst, abs(found["iv"] - wanted) / wanted)
    return worst


def woe(quick: bool) -> list[Row]:
    """WOE and IV, binned by quantiles and optimally."""
    num_rows, num_features = (100_000, 30) if quick else (1_000_000, 100)
    tables = credit_tables(num_rows, num_features)
    content = {"name": "woe", "protection": "plain", "program": "statistics.woe"}
    schema = tables["a"].schema.model_dump(mode="json")
    found, seconds, traffic = {}, {}, {}
    for binning in ("quantile", "optimal"):
        params = {"target": "default", "binning": binning, "bins": 10}
        plan = Plan.from_json({**content, "schema": schema, "params": params})
        result, seconds[binning], traffic[binning] = run(plan, tables)
        found[binning] = result["woe"]["features"]
    rows = concatenate(list(tables.values()))
    pooled = pd.DataFrame(dict(rows.columns), copy=False)
    began = time.perf_counter()
    for name in found["quantile"]:
        pandas_iv(pd.qcut(pooled[name], 10, duplicates="drop"), pooled["default"])
    peer = time.perf_counter() - began
    size = f"{num_rows:,} × {num_features}, 3 sites"
    return [
        Row(f"WOE and IV by deciles, {size}", seconds["quantile"], "s", peer, 60.0, "peer: pandas, pooled table"),
        Row("the same, ratio", seconds["quantile"] / peer, "×"),
        Row("the same, traffic a site", traffic["quantile"], "MB", None, 3.0, "to and from it"),
        Row("the same, largest relative difference of IV", difference(found["quantile"], pooled), "", None, 1e-9,
            "from pandas at the same edges"),
        Row(f"WOE and IV, optimal bins, {size}", seconds["optimal"], "s", None, 60.0, "of 20 pre-bins each"),
        Row("the same, traffic a site", traffic["optimal"], "MB", None, 3.0, "to and from it"),
        Row("the same, largest relative difference of IV", difference(found["optimal"], pooled), "", None, 1e-9,
            "from pandas at the same edges"),
    ]  # fmt: skip


# ---------------------------------------------------------------- a large table in little memory

NUMBERS = [f"x{i}" for i in range(26)]
STEPS = [
    {"step": "impute", "columns": NUMBERS[:10]},
    {"step": "scale", "columns": NUMBERS[10:20]},
    {"step": "threshold", "column": "x25", "above": 0, "into": "high"},
]


def write_large(path: Path, num_rows: int) -> None:
    """A Parquet file of *num_rows* × 30: numbers with 2% missing, a code, a date, a label and an id."""
    random = np.random.default_rng(SEED)
    types = [*((name, pa.float64()) for name in NUMBERS), ("code", pa.string()), ("day", pa.date32())]
    schema = pa.schema([*types, ("label", pa.int8()), ("id", pa.int64())])
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, num_rows, size := 250_000):
            cells: dict[str, Any] = {}
            for name in NUMBERS:
                values = random.normal(size=size).clip(-8, 8)
                cells[name] = pa.array(np.where(random.random(size) < 0.02, np.nan, values), from_pandas=True)
            cells["code"] = np.array(["a", "b", "c", "d"])[random.integers(0, 4, size)]
            cells["day"] = np.datetime64("2024-01-01") + random.integers(0, 365, size)
            cells["label"] = random.integers(0, 2, size).astype(np.int8)
            cells["id"] = np.arange(start, start + size)
            file.write_table(pa.table(cells, schema=schema))


def _atoll_large(path: Path) -> dict[str, Any]:
    load_installed()
    settle()
    columns: dict[str, Any] = {name: {"range": [-8, 8]} for name in NUMBERS}
    columns["code"] = {"dtype": "text", "values": ["a", "b", "c", "d"]}
    columns |= {"day": {"dtype": "date"}, "label": {"dtype": "integer", "values": [0, 1], "role": "label"}}
    columns["id"] = {"dtype": "integer", "role": "entity"}
    content = {"name": "large", "protection": "plain", "program": "statistics.describe", "cohort": {"min_sites": 1}}
    schema = {"name": "large", "max_rows": 20_000_000, "columns": columns}
    plan = Plan.from_json({**content, "schema": schema, "recipe": {"steps": STEPS}, "run": {"deadline_s": 600}})
    with tempfile.TemporaryDirectory() as out:
        result, _ = run_sandbox(plan, {"one": SourceSpec(path=path.name)}, path.parent, Path(out))
    return {name: told["mean"] for name, told in result["statistics"]["columns"].items()}


def _pandas_large(path: Path) -> dict[str, Any]:
    table = pd.read_parquet(path)
    table[NUMBERS[:10]] = table[NUMBERS[:10]].fillna(table[NUMBERS[:10]].mean())
    scaled = table[NUMBERS[10:20]]
    table[NUMBERS[10:20]] = (scaled - scaled.mean()) / scaled.std()
    table["high"] = (table.pop("x25") > 0).where(table.index >= 0).astype(float)
    return {str(name): float(table[name].describe()["mean"]) for name in NUMBERS[:-1]}


def _measured(work: str, path: Path, answer: Any) -> None:
    began = time.perf_counter()
    means = {"atoll": _atoll_large, "pandas": _pandas_large}[work](path)
    # not ru_maxrss: that of a process that was forked begins with its parent's
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    answer.send((means, time.perf_counter() - began, peak))


def large(quick: bool) -> list[Row]:
    """A table far larger than the memory that its site may use, prepared and described, in a process each."""
    num_rows = 1_000_000 if quick else 10_000_000
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        write_large(path, num_rows)
        found: dict[str, Any] = {}
        for work in ("atoll", "pandas"):
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=_measured, args=(work, path, theirs))
            child.start()
            found[work] = ours.recv()
            child.join()
    (means, seconds, memory), (wanted, peer, peer_memory) = found["atoll"], found["pandas"]
    worst = max(abs(means[name] - wanted[name]) for name in NUMBERS[:10])
    size = f"{num_rows / 1e6:g}M × 30"
    return [
        Row(f"prepare and describe {size}, peak memory", memory / 2**30, "GiB", peer_memory / 2**30, 1e9 / 2**30,
            "peer: pandas, same file; the whole process counts"),
        Row("the same, time", seconds, "s", peer, None, "three rounds, ledgers included"),
        Row("the same, largest difference of a mean from pandas", worst, "", None, 1e-9),
    ]  # fmt: skip


def measure(quick: bool) -> list[Row]:
    """All rows."""
    load_installed()
    settle()
    return [*woe(quick), *large(quick)]


if __name__ == "__main__":
    main("statistics", ["atoll", "numpy", "pandas"], measure, SEED)
