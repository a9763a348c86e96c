"""The sections of the report, in the order of the page. Each is None when its part of the input is absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoll.report import plots
from atoll.report.markup import Child, Html, code, element, join, table
from atoll.report.words import (
    NOTHING, counted, duration, fixed, listed, p_value, percent, real, significant, size, whole,
)  # fmt: skip

Input = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown. better: "higher" or "lower". chance: what guessing scores, if that is fixed."""

    name: str
    meaning: str
    better: str
    chance: float | None = None


METRICS = {
    "auc": Metric("AUC", "how often a positive record is scored above a negative one; 0.5 is guessing", "higher", 0.5),
    "ks": Metric("KS", "largest gap between the scores of the two groups, from 0 to 1", "higher"),
    "accuracy": Metric("Accuracy", "share of records called rightly, at a threshold of 50 %", "higher"),
    "f1": Metric("F1", "balance of missed positives and false alarms, at a threshold of 50 %", "higher"),
    "log_loss": Metric("Log loss", "penalty for probabilities that are wrong, more so when they are sure", "lower"),
    "brier": Metric("Brier score", "mean squared error of the probabilities", "lower"),
    "mae": Metric("MAE", "mean absolute error: how far off predictions are on average", "lower"),
    "rmse": Metric("RMSE", "root mean squared error: as MAE, with large errors weighing more", "lower"),
    "r2": Metric("R²", "share of the target's variance that is explained; 1 is all of it", "higher"),
}
PLOTTED = ("auc", "accuracy", "log_loss", "mae", "rmse")
KINDS = {
    "local": "trained at the site alone",
    "federated": "trained together",
    "pooled": "trained on all records in one place",
}


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its anchor in the page, its title, and its content."""

    anchor: str
    title: str
    content: Sequence[Child]

    def html(self) -> Html:
        """The ``<section>``."""
        return element("section", element("h2", self.title), *self.content, id=self.anchor)


def figure(plot: Html | None, title: str, note: Child = None) -> Html | None:
    """A plot with its title and a note in one card."""
    if plot is None:
        return None
    return element("figure", element("figcaption", element("strong", title), *([" ", note] if note else [])), plot)


def cards(figures: Sequence[Html | None], kind: str = "cards") -> Html | None:
    """Figures side by side where there is room."""
    shown = [one for one in figures if one is not None]
    return element("div", shown, class_=kind) if shown else None


def _para(*children: Child) -> Html:
    return element("p", *children)


def _explained(metric: str, unit: str = "") -> Html:
    known = METRICS.get(metric, Metric(metric, "", ""))
    in_unit = f", in {unit}" if unit and metric in ("mae", "rmse") else ""
    words = "; ".join(filter(None, (known.meaning + in_unit, f"{known.better} is better" if known.better else "")))
    return join(known.name, element("small", words) if words else None)


def _target_unit(result: Input, details: Input) -> str:
    spec = (result.get("model") or {}).get("spec") or {}
    return str((details.get("units") or {}).get(str(spec.get("target", "")), ""))


def metrics(result: Input, details: Input) -> Section | None:
    """The shared model's metrics on held-out rows, beside the pooled model's."""
    found = (result.get("metrics") or {}).get("federated") or {}
    pooled = (result.get("metrics") or {}).get("pooled") or {}
    names = [n for n in (*METRICS, *sorted(set(found) - set(METRICS))) if n in found and n not in ("auc_error", "rows")]
    if not names:
        return None
    rows = []
    for name in names:
        a, b = real(found[name]), real(pooled.get(name))
        gap = NOTHING if a is None or b is None else "none" if abs(a - b) < 1e-12 else significant(a - b, 2)
        unit = _target_unit(result, details)
        rows.append([_explained(name, unit), fixed(a), *([fixed(b), gap] if pooled else [])])
    off = real(found.get("auc_error"))
    note = None
    if off is not None:
        note = f"AUC is read from a histogram of scores; it is exact to within ± {significant(off, 1)}."
    header = ["Metric", "Federated", *(["Pooled", "Difference"] if pooled else [])]
    said = "Measured on records that every site kept aside: no model saw them in training."
    also = " “Pooled” is the same plan on all records in one place, which only a rehearsal can do." if pooled else ""
    curves = details.get("curves") or {}
    return Section(
        "results",
        "Results",
        [
            _para(said, also),
            table("Quality on held-out records, all sites together", header, rows, note=note),
            cards(
                [
                    figure(
                        plots.roc(curves.get("roc") or {}, found.get("auc")),
                        "ROC curve",
                        "share of positives found, by share of false alarms",
                    ),
                    figure(
                        plots.calibration(curves.get("calibration") or []),
                        "Calibration",
                        "on the diagonal, predicted risks come true; larger dots hold more records",
                    ),
                ]
            ),
        ],
    )


def convergence(result: Input, details: Input) -> Section | None:
    """Training loss by step."""
    history = details.get("history") or []
    plot = plots.convergence(history)
    if plot is None:
        return None
    losses = [loss for row in history if (loss := real(row.get("loss"))) is not None]
    steps = real((result.get("model") or {}).get("converged_rounds"))
    end = f" Training had converged after {counted(int(steps), 'step')}." if steps is not None else ""
    said = (
        f"The loss is the error that training makes smaller: from {fixed(losses[0])} to {fixed(losses[-1])} per record."
    )
    return Section(
        "convergence",
        "Convergence",
        [_para(said, end), cards([figure(plot, "Training loss", "mean per record, lower is better")])],
    )


def by_site(result: Input, details: Input) -> Section | None:
    """Local, federated and pooled models at each site."""
    whole_cohort = result.get("metrics") or {}
    per_site: dict[str, Any] = {s: v for s, v in (whole_cohort.get("per_site") or {}).items() if any(v.values())}
    shown = [
        m for m in PLOTTED if any(real((k or {}).get(m)) is not None for v in per_site.values() for k in v.values())
    ]
    if not shown:
        return None
    everyone = {kind: whole_cohort.get(kind) or {} for kind in ("federated", "pooled")}
    kinds = [k for k in ("local", "federated") if any(v.get(k) for v in per_site.values())]
    legend = [k for k in KINDS if k in kinds or everyone.get(k)]
    pictures = []
    for name in shown:
        values = {s: {k: (v.get(k) or {}).get(name) for k in kinds} for s, v in per_site.items()}
        told = METRICS[name]
        note = f"{told.better} is better" + ("; dashed: guessing" if told.chance is not None else "")
        plot = plots.comparison(told.name, values, {k: v.get(name) for k, v in everyone.items()}, chance=told.chance)
        pictures.append(figure(plot, told.name, note))
    header = ["Site", "Held-out rows", *(f"{METRICS[m].name}, {k}" for m in shown for k in kinds)]
    rows = [
        [
            s,
            whole((v.get("federated") or {}).get("rows")),
            *(fixed((v.get(k) or {}).get(m)) for m in shown for k in kinds),
        ]
        for s, v in per_site.items()
    ]
    notes = [
        _para(_failed(str(site), why), class_="note") if False else element("p", _failed(str(site), why), class_="note")
        for site, why in (whole_cohort.get("notes") or {}).items()
    ]
    keys = [element("li", element("span", class_=f"key {k}"), element("b", k), f" {KINDS[k]}") for k in legend]
    return Section(
        "sites", "Site by site",
        [
            _para(_verdict(per_site, shown[0])),
            element("ul", keys, class_="legend"),
            cards(pictures),
            table("Each site's own held-out records", header, rows),
            notes,
        ],
    )  # fmt: skip


def _failed(site: str, why: object) -> str:
    which = "The pooled model" if site == "pooled" else f"The model of {site} alone"
    return f"{which} could not be trained: {why}."


def _verdict(per_site: Mapping[str, Any], metric: str) -> str:
    """How many sites gain from taking part, by *metric*."""
    pairs = [((v.get("federated") or {}).get(metric), (v.get("local") or {}).get(metric)) for v in per_site.values()]
    both = [(f, o) for a, b in pairs if (f := real(a)) is not None and (o := real(b)) is not None]
    said = "Each model is tested on the site's own held-out records."
    if not both:
        return said
    gain = sum(f > o if METRICS[metric].better == "higher" else f < o for f, o in both)
    alone = len(per_site) - len(both)
    rest = f" For {counted(alone, 'site')} there is no model of its own to compare with." if alone else ""
    of = f"{gain} of the {len(both)} sites" if len(both) > 1 else f"{gain} of 1 site"
    return (
        f"{said} By {METRICS[metric].name}, the shared model does better than the site's own at {of} with both.{rest}"
    )


def coefficients(result: Input, details: Input) -> Section | None:
    """The model's coefficients, with confidence intervals and odds ratios where they exist."""
    model = result.get("model") or {}
    lines = model.get("table") or [{"name": n, "coefficient": c} for n, c in (model.get("coefficients") or {}).items()]
    if not lines:
        return None
    units = details.get("units") or {}
    family = (model.get("spec") or {}).get("family")
    odds = family == "logistic" or (family is None and "auc" in ((result.get("metrics") or {}).get("federated") or {}))
    errors = any(real(row.get("std_error")) is not None for row in lines)
    rows = []
    for row in lines:
        c, e = real(row.get("coefficient")), real(row.get("std_error"))
        half = None if e is None else plots.Z_95 * e
        unit = units.get(str(row.get("name")))
        cells: list[Child] = [join(row.get("name"), element("small", f"per {unit}") if unit else None), significant(c)]
        if errors:
            cells += [significant(e, 3), _interval(c, half), p_value(row.get("p_value"))]
        if odds:
            cells.append(
                NOTHING if c is None or abs(c) > 50 or row.get("name") == "intercept" else significant(math.exp(c), 3)
            )
        rows.append(cells)
    header = [
        "Feature",
        "Coefficient",
        *(["Standard error", "95 % interval", "p"] if errors else []),
        *(["Odds ratio"] if odds else []),
    ]
    said = "What the model adds to its score when a feature grows by one unit and the others stay."
    ratio = " An odds ratio above 1 means that the outcome becomes more likely." if odds else ""
    plot = figure(
        plots.forest(lines),
        "Coefficients with 95 % intervals",
        "hollow: zero is not excluded; each panel has its own scale",
    )
    return Section(
        "coefficients",
        "Coefficients",
        [_para(said, ratio), cards([plot]), table("Coefficients, in the features' own units", header, rows)],
    )


def _interval(middle: float | None, half: float | None) -> str:
    if middle is None or half is None:
        return NOTHING
    return f"{significant(middle - half, 3)} to {significant(middle + half, 3)}"


def statistics(result: Input, details: Input) -> Section | None:
    """Columns' statistics, with small histograms."""
    columns: Mapping[str, Any] = (result.get("statistics") or {}).get("columns") or {}
    if not columns:
        return None
    units = {name: str((details.get("units") or {}).get(name) or "") for name in columns}
    rows = [
        [
            join(name, element("small", units[name]) if units[name] else None), whole(c.get("count")),
            f"{whole(c.get('missing'))} ({percent(c.get('missing'), c.get('rows'))})" if real(c.get("missing")) else whole(c.get("missing")),
            *(significant(c.get(key)) for key in ("mean", "std", "low", "high")),
        ]
        for name, c in columns.items()
    ]  # fmt: skip
    small = [figure(plots.histogram(str(n), c, units[n]), str(n), units[n] or None) for n, c in columns.items()]
    total = whole((result.get("statistics") or {}).get("rows"))
    said = f"{total} rows of all sites together. The line in a histogram is the mean."
    note = (
        "Smallest and largest values never leave a site: “low” and “high” bound all but a few of the outermost values."
    )
    header = ["Column", "Values", "Missing", "Mean", "Standard deviation", "Low", "High"]
    return Section(
        "statistics",
        "Statistics",
        [_para(said), cards(small, "small cards"), table("Statistics of all sites together", header, rows, note=note)],
    )


def preparation(result: Input, details: Input) -> Section | None:
    """Values that the recipe's steps computed over all sites."""
    units = details.get("units") or {}
    rows = [
        [column, f"{int(step) + 1}" if str(step).isdecimal() else step, _value(value), units.get(column, "")]
        for step, fitted in (result.get("fitted") or {}).items()
        for column, value in (fitted or {}).items()
    ]
    if not rows:
        return None
    said = "Every site prepared its table in the same way, with these values, computed from all sites together."
    return Section(
        "preparation",
        "Preparation",
        [_para(said), table("Values used in preparation", ["Column", "Step of the recipe", "Value", "Unit"], rows)],
    )


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return significant(value) if real(value) is not None or value is None else str(value)


def releases(result: Input, details: Input) -> Section | None:
    """What left each site, in words; sites that released the same share one table."""
    found: Mapping[str, Any] = details.get("releases") or {}
    privacy = result.get("privacy") or {}
    if not found and not privacy.get("statement"):
        return None
    alike: dict[tuple[Any, ...], list[str]] = {}
    for site, items in found.items():
        alike.setdefault(
            tuple((i.get("program"), i.get("handler"), i.get("what"), i.get("times")) for i in items), []
        ).append(site)
    tables: list[Child] = []
    for kinds, sites in alike.items():
        rows = []
        for i, (program, handler, what, times) in enumerate(kinds):
            sizes = [n for site in sites if (n := real(found[site][i].get("bytes"))) is not None]
            rows.append([what, code(f"{program} · {handler}"), whole(times), _span(sizes)])
        each = f"Each of {listed(sites)}" if len(sites) > 1 else str(sites[0])
        header = ["What", "For", "Times", "Size in all" + (", per site" if len(sites) > 1 else "")]
        tables.append(
            table(f"{each} released", header, rows, text_columns=2) if rows else _para(f"{each} released nothing.")
        )
    epsilon = real(privacy.get("epsilon"))
    spent = (
        f"ε = {significant(epsilon, 3)}" + (f" for each {privacy['unit']}" if privacy.get("unit") else "")
        if epsilon is not None
        else ""
    )
    promise: list[Child] = [
        element(
            "p", element("b", "Protection: "), code(privacy.get("protection") or result.get("protection") or NOTHING)
        ),
        _para(privacy["statement"]) if privacy.get("statement") else None,
        _para("Differential privacy: ", spent or "none; no noise was added and no ε is claimed."),
    ]
    said = "Records stay where they are. Each site wrote every message that left it into its own signed ledger, before sending it; these are all of them."
    return Section(
        "releases",
        "What left each site",
        [_para(said) if found else None, element("div", promise, class_="promise"), tables],
    )


def _span(sizes: Sequence[float]) -> str:
    if not sizes:
        return NOTHING
    least, most = size(min(sizes)), size(max(sizes))
    return least if least == most else f"{least} to {most}"


def traffic(result: Input, details: Input) -> Section | None:
    """Bytes on the wire, and time by kind of round."""
    wire = result.get("wire") or {}
    plot = figure(
        plots.traffic(wire.get("to_sites_bytes"), wire.get("from_sites_bytes")),
        "Bytes on the wire",
        "all sites and rounds, envelopes included",
    )
    kinds: dict[str, list[float]] = {}
    for row in details.get("rounds") or []:
        kinds.setdefault(str(row.get("name")), []).append(real(row.get("seconds")) or 0.0)
    if plot is None and not kinds:
        return None
    rows = [
        [code(name), whole(len(spent)), duration(sum(spent)), duration(max(spent))] for name, spent in kinds.items()
    ]
    content: list[Child] = [cards([plot])]
    if rows:
        content.append(table("Rounds of questions and answers", ["Round", "Times", "Time in all", "Longest"], rows))
    return Section("traffic", "Traffic and time", content)


def verification(result: Input, details: Input) -> Section | None:
    """How anybody who has the ledgers can check this page."""
    plan = result.get("plan_hash")
    steps = [
        join(
            "Put the ledgers of the coordinator and of the sites, one file per party, into a folder ",
            code("ledger"),
            ".",
        ),
        join(
            "Run this command; it needs no network:",
            element("pre", element("code", "atoll ledger verify ledger/*.jsonl"), tabindex="0"),
        ),
        "It checks every signature and every link of each ledger, and that what a site released is what the "
        "coordinator received. A changed, missing or cut-off entry is named.",
        join("Compare the plan’s hash with the one that your institution approved: ", code(plan)) if plan else None,
    ]
    return Section(
        "verify", "How to verify", [element("ol", [element("li", step) for step in steps if step is not None])]
    )


ALL: tuple[Callable[[Input, Input], Section | None], ...] = (
    metrics, by_site, convergence, coefficients, statistics, preparation, releases, traffic, verification,
)  # fmt: skip
