"""The card that lies beside a stored model: what it is, who trained it on what, how well it does, and its limits.

Sources: Mitchell et al. 2019, Model Cards for Model Reporting (FAT*), §4, whose headings these are; the header is YAML
as model hubs read it (https://huggingface.co/docs/hub/model-cards). Everything in it stands in the plan or the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from atoll import __version__
from atoll.contract.plan import Plan
from atoll.contract.schema import Column, TableSchema
from atoll.models.linear import TASK
from atoll.models.model import Goal, ModelTask
from atoll.models.trees import TASKS

WORDS: dict[ModelTask, str] = {
    "binary": "the probability that {target} is 1", "classes": "the probability of each value of {target}",
    "regression": "{target}", "count": "the expected count {target}",
}  # fmt: skip
KNOWN = ("auc", "accuracy", "f1", "macro_f1", "balanced_accuracy", "log_loss", "brier", "ks", "mae", "rmse", "r2")
HEADER = """\
---
{header}---

# {name}

{summary}

## Model details

{details}

Settings:

```yaml
{spec}```

Read it with scikit-learn's interface, of a table as the recipe leaves it:

```python
from atoll.models import estimator

model = estimator.load("path/of/this/folder")
model.predict(frame)
```

## Intended use

Trained for the purpose **{purpose}**, which is what the sites' policies allowed. It answers for rows that keep the data
contract below and come from where the training rows came from; another use, population or instrument needs an
evaluation of its own first, and it takes no decision about a person by itself.

## Data contract

Table `{schema}`, version {version}, after the plan's recipe. Columns that the model reads or predicts:

{columns}

## Training data

{sites}

Rows stayed at their sites. {held}

## Training

`{program}`, {rounds} rounds, seed {seed}, with

```yaml
{params}```

## Privacy

{privacy}

## Metrics

{metrics}

{kind}## Limitations

{limits}
"""
TREES = """\
## What it leans on

{trees} trees with {leaves} leaves. What their splits took off the training loss, by feature (which says nothing of
causes):

{importance}

`atoll export THIS_FOLDER --format xgboost` writes it for XGBoost, and `model.shap_values(frame)` explains single rows.

"""
MOST_FEATURES = 20
"""In the card's table."""


def card(plan: Plan, schema: TableSchema, result: Mapping[str, Any], num_weights: int) -> str:
    """Markdown of a run's model. schema: of the prepared table; result: as result.json has it."""
    spec, metrics = result["model"]["spec"], result["metrics"]
    targets = (spec["target"],) if isinstance(spec["target"], str) else tuple(spec["target"])
    told = {"linear": TASK.get(spec.get("family")), "trees": TASKS.get(spec.get("link"))}
    task = told.get(spec["kind"]) or Goal.of(schema, targets).task
    columns = {n: c for n, c in schema.columns.items() if n in set(words_of(spec))}
    target, sites = ", ".join(f"`{name}`" for name in targets), result["sites"]
    what = predicted(plan, spec) or WORDS[task].format(target=target)
    summary = (
        f"A model of kind `{spec['kind']}` that predicts {what}, trained together by {len(sites)} sites that did "
        "not pool their records."
    )
    details = {
        "kind": spec["kind"], "weights": num_weights, "task": task, "study": plan.name, "program": plan.program,
        "plan (SHA-256)": result["plan_hash"], "run": result["run"], "made by": f"Atoll {__version__}",
        **({"personal to": result["model"]["site"]} if "site" in result["model"] else {}),
    }  # fmt: skip
    held = f"{plan.run.holdout:.0%} of each site's rows were held out for the metrics." if plan.run.holdout else ""
    return HEADER.format(
        header=_yaml(header(plan, task, columns, metrics["federated"])),
        name=plan.name,
        summary=summary,
        details=table(("", ""), details.items()),
        spec=_yaml({name: value for name, value in spec.items() if value is not None}),
        purpose=plan.purpose,
        schema=schema.name,
        version=schema.version,
        columns=table(
            ("column", "role", "kind", "unit", "allowed", "meaning"),
            ((n, c.role, c.dtype, c.unit, allowed(c), c.description) for n, c in columns.items()),
        ),
        sites=table(
            ("site", "rows"), ((n, "not shared" if s["rows"] is None else s["rows"]) for n, s in sites.items())
        ),
        held=held,
        program=plan.program,
        rounds=result["rounds"],
        seed=plan.run.seed,
        params=_yaml(plan.params),
        privacy=privacy(result["privacy"]),
        metrics=scores(metrics),
        kind=of_trees(result["model"].get("trees")),
        limits="\n".join(f"- {line}" for line in limits(plan, result)),
    )


def predicted(plan: Plan, spec: Mapping[str, Any]) -> str:
    """What trees predict that their task does not say; "" where it does."""
    asked = plan.params.get("objective") if spec["kind"] == "trees" else None
    objective = asked if isinstance(asked, Mapping) else {"kind": asked}
    if spec.get("link") == "isolation":
        return "how much of an anomaly a row is"
    return {
        "cox": f"a risk relative to others', from `{spec['target']}` and `{objective.get('event')}`",
        "quantile": f"the {objective.get('alpha', 0.5)}-quantile of `{spec['target']}`",
    }.get(str(objective["kind"]), "")


def words_of(value: Any) -> Iterable[str]:
    """All texts in a spec: the names of columns are among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from words_of(part)


def header(plan: Plan, task: ModelTask, columns: Mapping[str, Column], found: Mapping[str, Any]) -> dict[str, Any]:
    """What hubs index."""
    kinds = {column.dtype for column in columns.values() if column.role != "label"}
    over = "image" if "image" in kinds else "text" if "text" in kinds and "real" not in kinds else "tabular"
    kind = f"{over}-{'classification' if task in ('binary', 'classes') else 'regression'}"
    scored = [{"type": name, "value": found[name]} for name in KNOWN if found.get(name) is not None]
    results = [{"task": {"type": kind}, "dataset": {"name": plan.table.name, "type": plan.dataset}, "metrics": scored}]
    return {
        "library_name": "atoll", "pipeline_tag": kind, "tags": ["federated-learning", plan.program],
        "metrics": [one["type"] for one in scored],
        "model-index": [{"name": plan.name, "results": results if scored else []}],
    }  # fmt: skip


def allowed(column: Column) -> str:
    """A column's values in words."""
    if column.dtype == "image":
        return " × ".join(map(str, column.shape or ()))
    if column.values is not None:
        return ", ".join(map(str, column.values))
    return f"{column.range[0]:g} to {column.range[1]:g}" if column.range else ""


def privacy(told: Mapping[str, Any]) -> str:
    """``privacy`` of result.json in sentences."""
    lines = [told["statement"] or "Nothing protected the sites' replies."]
    if told["noised"]:
        lines.append(f"Differential privacy: ε = {told['epsilon']:g}, δ = {told['delta']:g} for each {told['unit']}.")
    else:
        lines.append("No noise was added: what the weights themselves tell of single rows has no proven bound.")
    return " ".join([*lines, *(f"Warning: {warning}." for warning in told["warnings"])])


def scores(metrics: Mapping[str, Any]) -> str:
    """Federated, pooled and local metrics on held-out rows, as far as there are any."""
    places = [("all sites", metrics), *metrics["per_site"].items()]
    lines = [
        (place, which, found[which])
        for place, found in places
        for which in ("federated", "personal", "local", "pooled")
        if isinstance(found.get(which), Mapping) and found[which]
    ]
    names = [name for name in KNOWN if any(values.get(name) is not None for _, _, values in lines)]
    if not names:
        return "No rows were held out, or nothing was scored."
    cells = ([p, w, *("–" if v.get(n) is None else f"{v[n]:.4g}" for n in names)] for p, w, v in lines)
    return "On held-out rows.\n\n" + table(("rows of", "model", *names), cells)


def of_trees(told: Mapping[str, Any] | None) -> str:
    """The part about a model of trees, by what ``result.json`` tells of it; nothing of another."""
    if told is None:
        return ""
    found = told["importance"]
    total = sum(max(one["gain"] or 0.0, 0.0) for one in found) or 1.0
    rows = ([one["feature"], f"{(one['gain'] or 0.0) / total:.1%}", one["splits"]] for one in found[:MOST_FEATURES])
    shown = table(("feature", "share of gain", "splits"), rows)
    return TREES.format(trees=told["trees"], leaves=told["leaves"], importance=shown)


def limits(plan: Plan, result: Mapping[str, Any]) -> list[str]:
    """What its reader should not take it for."""
    found = [
        "Sites differ: the metrics of all sites together can hide one where the model does badly.",
        "It knows no group of people but those that the columns tell: fairness between others was not measured.",
        "Values outside the contract's ranges are extrapolated, without a warning.",
    ]
    if not result["metrics"]["per_site"] or not any(
        one.get("federated") for one in result["metrics"]["per_site"].values()
    ):
        found.append("No site shared metrics of its own.")
    if result["fitted"]:
        found.append("The recipe fitted values (model.json, `fitted`): they must be applied before the model.")
    if plan.privacy is None:
        found.append("Membership of a row in the training data may be guessed from it: see `atoll audit`.")
    return found


def table(names: Sequence[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    rows = [
        names,
        ["---"] * len(names),
        *([str(c).replace("|", "\\|").replace("\n", " ") for c in one] for one in lines),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100))
