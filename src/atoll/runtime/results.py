"""What a finished run leaves behind: result.json, the model, details for the report, ledgers."""

from __future__ import annotations

import datetime as dt
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atoll import __version__
from atoll.contract.plan import Plan
from atoll.contract.program import REGISTRY
from atoll.contract.protection import REPLY
from atoll.contract.rounds import Gathered, Reduced, Round, Summed
from atoll.contract.wire import Array, Json
from atoll.data.recipe import Prepared
from atoll.models import stored
from atoll.models.importance import told as told_trees
from atoll.models.model import Predictor
from atoll.models.trees import Trees
from atoll.privacy.dp.noise import delta_warning
from atoll.privacy.dp.release import Noise
from atoll.runtime.model_card import card
from atoll.runtime.value import value_of

SUMMED = "Sums were masked: the coordinator saw only the sum of {sites}, and no site saw another's numbers."
PROTECTED = {
    "plain": "Sums were made by the coordinator from each site's own share: it saw every site's share, and no row.",
    "secagg": SUMMED,
    "paillier": SUMMED.replace("masked", "masked and encrypted")
    + " {holder}, which held the key, decrypted masked sums, which tell it nothing, alone or with the coordinator.",
    "ckks": "Sums were encrypted: the coordinator added what it could not read, and learned only the sum of {sites}."
    " {holder}, which held the key, saw that sum. A coordinator that broke the protocol could read a site's share.",
}
NOISED = {
    True: " Each site added its share of the noise before its numbers were protected.",
    False: " What it saw of a site, and the sums, carry noise that the site added before anything left it.",
}
"""By whether only sums are seen."""


def to_plain(value: Any) -> Json:
    """*value* with numpy scalars and arrays as plain numbers and lists, and NaN as None."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def summarise(
    run: str, plan: Plan, outcome: Mapping[str, Any], *, sites: Mapping[str, int | None], rounds: int, seconds: float,
    transport: str, traffic: Mapping[str, int], noise: Noise | None = None, seen: Seen | None = None,
) -> tuple[dict[str, Json], dict[str, Array]]:  # fmt: skip
    """(result.json, model arrays) of a run's outcome."""
    found, evaluation = dict(outcome["result"]), outcome["evaluation"] or {}
    model = found.pop("model", None)
    own, personal = evaluation.get("own", {}), evaluation.get("personal")
    result: dict[str, Any] = {
        "study": plan.name,
        "program": plan.program,
        "plan_hash": plan.hash,
        "run": run,
        "transport": transport,
        "protection": plan.protection.sum,
        "seed": plan.run.seed,
        "rounds": rounds,
        "seconds": seconds,
        "sites": {site: {"rows": rows} for site, rows in sites.items()},
        "wire": dict(traffic),
        "metrics": {
            "federated": evaluation.get("pooled", {}),
            "per_site": {site: {"federated": own.get(site, {})} for site in sites},
        },
        "privacy": told_privacy(plan, sites, noise, seen or Seen()),
        "fitted": outcome["fitted"],
        "preparation": outcome["preparation"],
        "curves": (personal or evaluation).get("curves", {}),
    }  # fmt: skip
    if personal is not None:
        result["metrics"]["personal"] = personal["pooled"]
        for site, metrics in result["metrics"]["per_site"].items():
            metrics["personal"] = personal["own"].get(site, {})
    for site, metrics in found.pop("alone", {}).items():
        result["metrics"]["per_site"][site]["local"] = metrics
    arrays: dict[str, Array] = {}
    if model is not None:
        arrays = {**model.arrays(), **found.pop("arrays", {})}
        table = {key: found.pop(key) for key in ("coefficients", "table", "iterations") if key in found}
        result["model"] = {**described(model), "converged_rounds": table.pop("iterations", None), **table}
        if isinstance(model, Trees):
            asked = plan.params.get("objective")
            kind = asked.get("kind") if isinstance(asked, Mapping) else asked
            result["model"] |= {"objective": kind, "trees": told_trees(model)}
    if "columns" in found:
        result["statistics"] = {"rows": found.pop("rows"), "columns": found.pop("columns")}
    if dense := found.pop("dense", None):
        result["compression"] = compression(dense, traffic)
    found.pop("history", None)
    result["output"] = found
    plain = to_plain(result)
    if value := value_of(plain):
        plain["value"] = value
    return plain, arrays


def compression(dense: Mapping[str, int], traffic: Mapping[str, int]) -> dict[str, Any]:
    """What travelled, both ways, against every weight as a float32 in every training round; None where nothing did.
    All that travelled counts, envelopes and evaluation too; of a run that was resumed, only what has since."""
    told: dict[str, Any] = {f"dense_{way}": size for way, size in dense.items()}
    ratios = {way: traffic.get(way, 0) / size if size else None for way, size in dense.items()}
    return told | {f"ratio_{way.removesuffix('_bytes')}": ratio for way, ratio in ratios.items()}


def described(model: Predictor) -> dict[str, Any]:
    """A model's spec, and the names of the arrays that make its weights, in order."""
    stored_as = model.arrays()
    return {"spec": model.spec(), "layers": [name for name in model.layers if name in stored_as] or ["weights"]}


@dataclass
class Seen:
    """What the coordinator saw of a run. survivors: fewest sites in a sum; singly: programs whose replies it saw
    site by site; mailed: programs whose sites wrote to each other."""

    survivors: int | None = None
    singly: set[str] = field(default_factory=set)
    mailed: set[str] = field(default_factory=set)

    def note(self, asked: Round, value: Reduced) -> None:
        """One reduction more."""
        if isinstance(value, Summed) and not value.sites:
            return  # a lenient sum that came to nothing
        if isinstance(value, Summed):
            self.survivors = min(len(value.sites), self.survivors or len(value.sites))
        elif _sealed(asked):
            self.mailed.add(asked.program)
        elif not isinstance(value, Gathered) or value.sites:
            self.singly.add(asked.program)


def _sealed(asked: Round) -> bool:
    """Does it bring keys and envelopes alone, which tell the coordinator nothing of the data?"""
    fields = asked.reply.values()
    return bool(fields) and all(field.dtype == "|u1" and field.shape[:1] == (None,) for field in fields)


def told_privacy(
    plan: Plan, sites: Mapping[str, int | None], noise: Noise | None = None, seen: Seen | None = None
) -> dict[str, Any]:  # fmt: skip
    """Who learned what, and what the run tells of one unit: ``privacy`` of result.json.

    epsilon, delta: what the plan promises. spent: ε that each site which answered every round was charged.
    survivors: fewest sites in a sum. warnings: of a promise that is worth little.
    """
    privacy, chosen = plan.privacy, plan.protection
    seen = seen or Seen()
    survivors, singly = seen.survivors, seen.singly
    fewest = len(sites) if survivors is None else survivors
    among = f"{fewest} sites" if fewest == len(sites) else f"at least {fewest} of {len(sites)} sites"
    statement = PROTECTED.get(chosen.sum, "").format(
        sites=among, holder=f"Site {chosen.key_holder}" if chosen.key_holder else "One of the sites"
    )
    if singly and chosen.sum != "plain":
        statement += f" Besides sums, the coordinator saw single sites' replies to {', '.join(sorted(singly))}."
    if seen.mailed:
        statement = statement.replace(", and no site saw another's numbers.", ".")
        statement += f" In {', '.join(sorted(seen.mailed))} sites sent each other what the coordinator could not read."
    told: dict[str, Any] = {
        "protection": chosen.sum, "statement": statement, "survivors": survivors, "noised": privacy is not None,
        **dict.fromkeys(("unit", "epsilon", "delta", "mechanism", "spent")), "warnings": [],
    }  # fmt: skip
    if privacy is None:
        return told
    if statement:
        told["statement"] += NOISED[chosen.sum != "plain"]
    told |= {name: getattr(privacy, name) for name in ("unit", "epsilon", "delta", "mechanism")}
    if noise is not None:
        told["spent"] = noise.costs[-1] if noise.costs else 0.0
    rows = [number for number in sites.values() if number is not None]
    units = len(sites) if privacy.unit == "site" else sum(rows) if len(rows) == len(sites) else 0
    told["warnings"] = [warning] if units and (warning := delta_warning(privacy.delta, units)) else []
    return told


OF_PROTECTION = "keys, sealed shares, signatures and opened shares, which tell nothing of the data"


def releases(ledger: Path, run: str = "") -> list[dict[str, Any]]:
    """What left a site (in one run, or ever), from its ledger, alike releases together: program, handler, what, bytes,
    times."""
    counted: Counter[tuple[str, str, str]] = Counter()
    size: Counter[tuple[str, str, str]] = Counter()
    for line in ledger.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] != "release" or run not in ("", entry["body"]["run"]):
            continue
        body = entry["body"]
        numbers = sum(math.prod(shape) for _, _, shape in body["fields"])
        own = body["step"] != REPLY
        said = OF_PROTECTION if own else _in_words(body["program"], body["handler"])
        hidden = "" if own or body["protection"] == "plain" or body["reduce"] != "sum" else ", hidden"
        what = said if own else f"{said} ({numbers} number{'s' if numbers > 1 else ''}{hidden})"
        key = (body["protection"] if own else body["program"], "" if own else body["handler"], what)
        counted[key] += 1
        size[key] += body["bytes"]
    return [
        {"program": p, "handler": h, "what": w, "bytes": size[p, h, w], "times": times}
        for (p, h, w), times in counted.items()
    ]


def _in_words(program: str, handler: str) -> str:
    """What a handler answers, as its docstring says it ("At the site: counts of …")."""
    made = REGISTRY[program].handlers.get(handler) if program in REGISTRY else None
    doc = (made.answer.__doc__ or "").strip().split(".")[0] if made is not None else ""
    return " ".join(doc.removeprefix("At the site: ").split()) or handler


def details(
    plan: Plan, metrics: list[dict[str, Any]], rounds: list[dict[str, Any]], ledgers: Mapping[str, Path]
) -> Any:
    """What the report shows beside result.json."""
    history: dict[int, dict[str, Any]] = {}
    for row in metrics:
        history.setdefault(row["step"], {"step": row["step"]})[row["name"]] = row["value"]
    return {
        "history": list(history.values()),
        "units": {name: column.unit for name, column in plan.table.columns.items() if column.unit},
        "purpose": plan.purpose,
        "rounds": [{k: row[k] for k in ("number", "name", "seconds")} for row in rounds],
        "releases": {site: releases(path) for site, path in ledgers.items() if site != "coordinator"},
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "versions": {"atoll": __version__, "python": platform.python_version()},
    }


def write_model(folder: Path, plan: Plan, result: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """The model in open formats: ``model.json`` and ``model.safetensors`` (see :mod:`atoll.models.stored`), with the
    run's metrics and privacy and what its recipe fitted; and its card, ``README.md``."""
    if not arrays:
        return
    schema = Prepared(plan.recipe).schema(plan.table)
    about = {k: result[k] for k in ("study", "program", "plan_hash", "run", "model", "fitted", "metrics", "privacy")}
    stored.save(folder, {**about, "schema": schema.model_dump(mode="json")}, arrays)
    size = sum(arrays[name].size for name in result["model"]["layers"])
    (folder / "README.md").write_text(card(plan, schema, result, size), encoding="utf-8")


def write_json(path: Path, value: Json) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
