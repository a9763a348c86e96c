"""Inputs of the report: a model study written down, and what real runs of the statistics programs leave."""

from __future__ import annotations

import copy
import csv
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from atoll.contract.plan import Plan
from atoll.data.sources import SourceSpec
from atoll.report import charts, epidemic_plots, plots
from atoll.report.markup import VOID
from atoll.runtime.sandbox import run_sandbox

SITES = {"north": 142, "harbour": 199, "university": None}
UNITS = {"age": "year", "trestbps": "mmHg", "chol": "mg/dl"}


def _binary(auc: float, **more: float) -> dict[str, float]:
    rest = {"ks": auc - 0.3, "accuracy": auc - 0.09, "f1": auc - 0.06, "log_loss": 1.3 - auc, "brier": 0.9 - 0.87 * auc}
    return {"auc": auc, **rest, **more}


def _column(low: float, high: float, rows: int, missing: int) -> dict[str, Any]:
    bins = 24
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    histogram = [round(rows / 6 * math.exp(-(((i - 10) / 4) ** 2))) for i in range(bins)]
    middle, spread = low + 0.44 * (high - low), 0.12 * (high - low)
    moments = {"mean": middle, "variance": spread**2, "std": spread, "low": edges[3], "high": edges[19]}
    return {
        "rows": rows, "count": rows - missing, "missing": missing, **moments, "edges": edges, "histogram": histogram,
    }  # fmt: skip


@pytest.fixture
def model_study() -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a logistic regression in the sandbox, with statistics beside it."""
    table = [
        {"name": name, "coefficient": c, "std_error": e, "z": c / e, "p_value": math.erfc(abs(c / e) / math.sqrt(2))}
        for name, c, e in (
            ("intercept", -5.33, 1.6), ("age", 0.0185, 0.0133), ("sex", 1.48, 0.28), ("chol", 0.00286, 0.00206),
            ("trestbps", 0.0187, 0.00655), ("exang", 0.86, 0.264),
        )
    ]  # fmt: skip
    pooled = _binary(0.874, auc_error=0.00028)
    result = {
        "study": "heart-disease", "program": "horizontal.glm", "plan_hash": "c6cab4" * 10 + "33fa",
        "run": "5ee32b92" * 4, "transport": "local", "protection": "plain", "seed": 7, "rounds": 10, "seconds": 83.2,
        "sites": {name: {"rows": rows} for name, rows in SITES.items()},
        "wire": {"to_sites_bytes": 82_984, "from_sites_bytes": 161_856},
        "metrics": {
            "federated": dict(pooled),
            "pooled": pooled,
            "per_site": {
                "north": {"federated": _binary(0.896, rows=43.0), "local": _binary(0.882, rows=43.0)},
                "harbour": {"federated": _binary(0.907, rows=60.0), "local": _binary(0.918, rows=60.0)},
                "university": {"federated": _binary(0.761, rows=68.0), "local": {}},
            },
            "notes": {"university": "every label is the same"},
        },
        "privacy": {"protection": "plain", "unit": None, "epsilon": None, "statement": "The coordinator saw shares."},
        "model": {"coefficients": {row["name"]: row["coefficient"] for row in table}, "table": table,
                  "converged_rounds": 6},
        "statistics": {"rows": 569, "columns": {
            "age": _column(20, 100, 569, 0), "trestbps": _column(60, 250, 569, 12), "chol": _column(50, 700, 569, 9),
        }},
        "fitted": {"0": {}, "1": {"trestbps": 132.487, "chol": 248.301}},
    }  # fmt: skip
    released = [
        {"program": "horizontal.glm", "handler": "labels", "what": "n (1 number), y (2 numbers)", "bytes": 24,
         "times": 1},
        {"program": "horizontal.glm", "handler": "newton", "what": "gradient (6 numbers), hessian (21 numbers)",
         "bytes": 3_840, "times": 6},
    ]  # fmt: skip
    rates = [i / 50 for i in range(51)]
    details = {
        "history": [{"step": i, "loss": 0.43 + 0.26 * 4.0**-i} for i in range(6)],
        "curves": {
            "roc": {"false_positive_rate": rates, "true_positive_rate": [rate**0.2 for rate in rates]},
            "calibration": [{"rows": 20 + 300 * p, "predicted": p, "observed": p**1.1} for p in rates[5::10]],
        },
        "units": dict(UNITS),
        "purpose": "research",
        "rounds": [{"number": i, "name": f"glm/{'newton' if i else 'labels'}", "seconds": 0.02} for i in range(7)],
        "releases": {site: [dict(one) for one in released] for site in SITES},
        "created": "2025-03-12T14:05:00+00:00",
        "versions": {"atoll": "0.1.0", "python": "3.11.7"},
    }  # fmt: skip
    return result, details


@pytest.fixture
def statistics_study(model_study: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a study without a model."""
    result, details = model_study
    result = {key: value for key, value in result.items() if key != "model"}
    result |= {"study": "ages", "program": "statistics.describe", "metrics": {"federated": {}, "per_site": {}}}
    return result, {**details, "history": [], "curves": {}}


REGIONS = ("hills", "coast", "isles", "plain")
COLUMNS: dict[str, dict[str, Any]] = {
    "age": {"unit": "year", "range": [0, 110]},
    "income": {"unit": "NT$", "range": [0, 500_000]},
    "debt": {"unit": "NT$", "range": [-1000, 900_000]},
    "sex": {"dtype": "integer", "values": [1, 2]},
    "region": {"dtype": "text", "values": list(REGIONS)},
    "months": {"dtype": "integer", "unit": "month", "range": [0, 36]},
    "seen": {"dtype": "date", "role": "time"},
    "default": {"dtype": "integer", "values": [0, 1], "role": "label"},
}
NUMBERS = ("age", "income", "debt")
EVERYTHING: dict[str, dict[str, Any]] = {
    "describe": {},
    "quantiles": {"columns": [*NUMBERS], "error": 1e-3},
    "frequency": {"columns": ["age", "sex", "region"]},
    "crosstab": {"pairs": [["sex", "default"], ["region", "sex"]]},
    "psi": {"columns": [*NUMBERS, "region"]},
    "correlation": {"columns": [*NUMBERS, "months"]},
    "vif": {"columns": [*NUMBERS]},
    "pca": {"columns": [*NUMBERS]},
    "group_by": {"by": ["region"], "columns": ["income", "age"]},
    "anova": {"column": "income", "by": "sex"},
    "ttest": {"column": "income", "by": "sex"},
    "woe": {"target": "default", "features": [*NUMBERS, "sex"]},
    "survival": {"duration": "months", "event": "default", "group": "sex"},
    "quality": {},
}


def _records(rows: int, seed: int) -> list[dict[str, Any]]:
    """People of one bank; two of them live on isles, so that what counts them is withheld."""
    draw = np.random.default_rng(seed)
    made = []
    for i in range(rows):
        age, income = draw.normal(45 + seed, 14), draw.gamma(3, 30_000)
        bad = draw.random() < 1 / (1 + math.exp(income / 40_000 - 1.5))
        region = "isles" if i < 2 and seed == 1 else REGIONS[(0, 1, 3)[int(draw.integers(3))]]
        made.append({
            "age": "" if draw.random() < 0.07 else round(min(max(age, 18), 99)), "income": round(min(income, 499_999)),
            "debt": "" if draw.random() < 0.05 else round(min(income * draw.uniform(0.2, 1.4), 890_000)),
            "sex": int(draw.integers(1, 3)), "region": region, "months": int(draw.integers(0, 37)), "default": int(bad),
            "seen": f"20{23 + int(draw.integers(2))}-{int(draw.integers(1, 13)):02d}-{int(draw.integers(1, 28)):02d}",
        })  # fmt: skip
    return made


def _run(folder: Path, program: str, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a rehearsal at three banks."""
    sources = {}
    for seed, (site, rows) in enumerate({"north": 260, "harbour": 180, "valley": 120}.items()):
        with (folder / f"{site}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(COLUMNS))
            writer.writeheader()
            writer.writerows(_records(rows, seed))
        sources[site] = SourceSpec(path=f"{site}.csv")
    plan = Plan.from_json({
        "atoll": 1, "name": "banks", "schema": {"name": "banks", "max_rows": 1000, "columns": COLUMNS},
        "program": program, "params": params, "protection": "plain",
        "recipe": {"steps": [{"step": "complete_rows", "columns": ["age"]}]},
    })  # fmt: skip
    return run_sandbox(plan, sources, folder, folder / "out")


@pytest.fixture(scope="session")
def _everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    ask = [{"program": f"statistics.{name}", "params": params} for name, params in EVERYTHING.items()]
    return _run(tmp_path_factory.mktemp("banks"), "statistics.several", {"ask": ask})


@pytest.fixture
def everything_study(_everything: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a real run of every statistic, of which some cells are withheld."""
    result, details = copy.deepcopy(_everything)
    return result, details


@pytest.fixture(scope="session")
def _periods(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    params = {"between": "periods", "date": "seen", "cut": "2024-01-01", "columns": ["income", "region"]}
    return _run(tmp_path_factory.mktemp("periods"), "statistics.psi", params)


@pytest.fixture
def periods_study(_periods: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a real run of drift between two periods."""
    result, details = copy.deepcopy(_periods)
    return result, details


@pytest.fixture(scope="session")
def _trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder, features = tmp_path_factory.mktemp("trees"), ["age", "income", "debt", "region"]
    asked = {"target": "default", "features": features, "trees": 3, "max_depth": 3, "max_bins": 16}
    result, details = _run(folder, "trees.boosted", asked)
    content = (folder / "out" / "model" / "model.safetensors").read_bytes()
    (folder / "risk.safetensors").write_bytes(content)
    base = {"name": "risk", "sha256": hashlib.sha256(content).hexdigest()}
    params = {"model": {**result["model"]["spec"], "base": base}, "dependence": True, "bins": 6}
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("ATOLL_MODELS", str(folder))
        told = _run(folder, "trees.explanation", params)[0]
    result["output"]["explanation"] = told["output"]["explanation"]
    return result, details


@pytest.fixture
def trees_study(_trees: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result, details) of a real run of boosted trees, and what a second one made of them told of their drivers."""
    result, details = copy.deepcopy(_trees)
    return result, details


# ---------------------------------------------------------------- drawings


def _key(value: Any) -> Any:
    """The same for two arguments of a drawing exactly if they are equal; functions are, by code and what they hold."""
    if isinstance(value, Mapping):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, _key(held), _key(value.__defaults__)
    return repr(value)


@pytest.fixture(autouse=True, scope="session")
def draw_anew() -> Iterator[Callable[[], None]]:
    """Draws the same only once, as most tests look at what stands around it, until this is called."""
    kept: dict[Any, Any] = {}

    def once(draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*arguments: Any, **more: Any) -> Any:
            key = (draw, _key(arguments), _key(more))
            if key not in kept:
                kept[key] = draw(*arguments, **more)
            return kept[key]

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, charts, epidemic_plots):
            for name, found in inspect.getmembers(module, inspect.isfunction):
                if found.__module__ == module.__name__ and found.__annotations__["return"] in ("Html", "Html | None"):
                    patch.setattr(module, name, once(found))
        yield kept.clear


def renamed(value: Any, old: str, new: str) -> Any:
    """*value* with every name or word *old* in it as *new*."""
    if isinstance(value, dict):
        return {renamed(key, old, new): renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return new if value == old else value


# ---------------------------------------------------------------- what must hold of every page


class Page(HTMLParser):
    """Every tag with its attributes, the text, and a check that tags are closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def anchors(self) -> list[str]:
        return [str(attributes["id"]) for attributes in self.all("section")]

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def _closed_world(content: str) -> Page:
    """The page parsed, after everything that must hold of every report."""
    seen = Page(content)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "link", "img", "image", "iframe", "object", "embed", "form", "base", "foreignobject"}
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data", "ping", "style-src") and not name.startswith("on")
            if name.endswith("href"):
                assert value and value[0] == "#" and value[1:] in ids, (tag, value)
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target[0] == "#" and target[1:] in ids, (tag, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", content, re.DOTALL))
    assert "url(" not in style and "@import" not in style
    assert "http:" not in content and "https:" not in content
    assert seen.all("html")[0] == {"lang": "en"} and seen.all("title")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in seen.all("meta")
    assert all(a.get("role") == "img" and a.get("aria-label") for a in seen.all("svg"))
    assert len(seen.all("caption")) == len(seen.all("table"))
    assert len(seen.all("h1")) == len(seen.all("main")) == 1
    assert "nan" not in re.sub(r"<[^>]*>", " ", content.split("</style>")[1]).lower().split()
    return seen


@pytest.fixture(scope="session")
def closed_world() -> Callable[[str], Page]:
    """Parses a page, after checking everything that must hold of every report."""
    return _closed_world


@pytest.fixture(scope="session")
def hostile() -> str:
    """A name that tries to be markup, a formula, a control character, and wide."""
    return '<script>alert("1")</script>&\'$x_2$ \x00\u202e' + "n" * 300


@pytest.fixture(scope="session")
def rename() -> Callable[[Any, str, str], Any]:
    """Replaces a name everywhere in a result."""
    return renamed
