"""The report's sections about a model: its quality, site by site, its training, its coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atoll.report import plots
from atoll.report.markup import Child, element, join, table
from atoll.report.section import Input, Section, beside, cards, figure, part, terms, text, unit_of
from atoll.report.words import NOTHING, counted, fixed, p_value, real, significant, whole


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
    "accuracy": Metric("Accuracy", "share of records called rightly at a threshold of 50 %", "higher"),
    "f1": Metric("F1", "balance between positives found and false alarms at a threshold of 50 %", "higher"),
    "balanced_accuracy": Metric("Balanced accuracy", "mean over classes of the share called rightly", "higher"),
    "macro_f1": Metric("Macro F1", "mean over classes of the balance between those found and false alarms", "higher"),
    "mean_auc": Metric("Mean AUC", "mean of the sites' own AUC, each by its records", "higher", 0.5),
    "log_loss": Metric("Log loss", "penalty for wrong probabilities, larger the surer they were", "lower"),
    "brier": Metric("Brier score", "mean squared error of the probabilities", "lower"),
    "mae": Metric("MAE", "mean absolute error: how far off predictions are on average", "lower"),
    "rmse": Metric("RMSE", "root mean squared error: like MAE, with large errors weighing more", "lower"),
    "r2": Metric("R²", "share of the target’s variance that is explained; 1 is all of it", "higher"),
}
PLOTTED = ("auc", "accuracy", "log_loss", "mae", "rmse")
OWN = ("local", "federated", "personal")
ENDED = {
    "patience": ", as nothing became better any more",
    "target": ", when its target was reached",
    "schedule": ", when the time or traffic that the plan allows was used up",
}
KINDS = {
    "local": "trained at the site alone",
    "federated": "trained together",
    "personal": "trained together, and fitted to each site for itself",
    "pooled": "trained on all records in one place",
}


def target_unit(result: Input, details: Input) -> str:
    """The unit of what the model predicts; "" when it has none."""
    target = part(result, "model", "spec").get("target")
    units = {unit_of(details, name) for name in (target if isinstance(target, list | tuple) else [target])}
    return units.pop() if len(units) == 1 else ""


def results(result: Input, details: Input) -> Section | None:
    """The shared model's metrics on held-out rows beside the personal and pooled models', ROC and calibration."""
    found, pooled = part(result, "metrics", "federated"), part(result, "metrics", "pooled")
    own = part(result, "metrics", "personal")
    kind, best = ("personal", own) if own else ("federated", found)
    told = {**own, **found}
    names = [n for n in (*METRICS, *sorted(set(told) - set(METRICS))) if n in told and n not in ("auc_error", "rows")]
    if not names:
        return None
    unit = target_unit(result, details)
    rows: list[list[Child]] = []
    for name in names:
        ours, b = real(best.get(name)), real(pooled.get(name))
        gap = NOTHING if ours is None or b is None else "none" if abs(ours - b) < 1e-12 else significant(ours - b, 2)
        shown = [METRICS[name].name if name in METRICS else name]
        if unit and name in ("mae", "rmse"):
            shown.append(f", {unit}")
        theirs = [fixed(own.get(name))] if own else []
        rows.append([shown, fixed(found.get(name)), *theirs, *([fixed(b), gap] if pooled else [])])
    said: list[Child] = ["Measured on records that every site kept aside: no model saw them in training."]
    if own:
        said.append(" “Personal” are the models that sites keep for themselves, each on the records of its own site.")
    if pooled:
        said.append(" “Pooled” is the same plan run on all records in one place, which only a rehearsal can do.")
    if own and pooled:
        said.append(" The difference is between personal and pooled.")
    off = real(best.get("auc_error"))
    note = off and f"AUC comes from a histogram of scores and is exact to within ± {significant(off, 1)}."
    explained = [METRICS[n] for n in names if n in METRICS]
    meanings = [(metric.name, f"{metric.meaning}; {metric.better} is better") for metric in explained]
    header = ["Metric", "Federated", *(["Personal"] if own else []), *(["Pooled", "Difference"] if pooled else [])]
    roc = plots.roc(part(details, "curves", "roc"), best.get("auc"), kind)
    calibration = plots.calibration(part(details, "curves").get("calibration") or [], kind)
    whose = ", personal models" if own else ""
    curves = [
        figure(roc, f"ROC curve{whose}", "share of positives found, by share of false alarms"),
        figure(calibration, f"Calibration{whose}", "on the diagonal, predicted risks come true"),
    ]
    content = [table("All sites together, held-out records", header, rows, note=note), terms(meanings, "terms")]
    return Section("results", "Results", [text(*said), *content, cards(curves)])


def by_site(result: Input, _: Input) -> Section | None:
    """Local, federated, personal and pooled models, on each site's own held-out rows."""
    everywhere = part(result, "metrics")
    sites = {s: {k: part(v, k) for k in OWN} for s, v in part(everywhere, "per_site").items()}
    sites = {site: found for site, found in sites.items() if any(found.values())}
    kinds = [k for k in OWN if any(found[k] for found in sites.values())]
    shown = [m for m in PLOTTED if any(real(v.get(m)) is not None for found in sites.values() for v in found.values())]
    if not shown:
        return None
    together = {kind: part(everywhere, kind) for kind in ("federated", "personal", "pooled")}
    pictures = []
    for name in shown:
        metric = METRICS[name]
        values = {site: {k: found[k].get(name) for k in kinds} for site, found in sites.items()}
        plot = plots.comparison(
            metric.name, values, {k: v.get(name) for k, v in together.items()}, chance=metric.chance
        )
        note = f"{metric.better} is better" + ("; dashed: guessing" if metric.chance is not None else "")
        pictures.append(figure(plot, metric.name, note))
    columns = [(m, k) for m in shown for k in kinds]
    header = ["Site", "Rows kept aside", *(f"{METRICS[m].name}, {k}" for m, k in columns)]
    rows = [
        [site, whole(next((found[k]["rows"] for k in ("federated", "local", "personal") if "rows" in found[k]), None))]
        + [fixed(found[k].get(m)) for m, k in columns]
        for site, found in sites.items()
    ]
    keys = [
        element("li", element("span", class_=f"key {k}"), element("b", k), f" {words}")
        for k, words in KINDS.items()
        if k in kinds or together.get(k)
    ]
    few = len(sites) > plots.MOST_SITES and text(f"The plots show the first {plots.MOST_SITES} sites.")
    unmade = {site: why for site, why in part(everywhere, "notes").items() if not part(sites, site, "local")}
    failed = [element("p", _failed(site, why), class_="note") for site, why in unmade.items()]
    intro = [text(_verdict(sites, shown[0])), element("ul", keys, class_="legend"), cards(pictures, "three")]
    whole_table = table("Each site’s own held-out records", header, rows)
    return Section("sites", "Site by site", [*intro, few or None, whole_table, failed])


def _failed(site: str, why: object) -> str:
    which = "The pooled model" if site == "pooled" else f"A model of {site} alone"
    return f"{which} could not be made: {why}."


def _verdict(sites: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """At how many sites the shared model, or the personal one, beats the site's own, by *metric*."""
    kind = "personal" if any(found["personal"] for found in sites.values()) else "federated"
    pairs = [(real(found[kind].get(metric)), real(found["local"].get(metric))) for found in sites.values()]
    both = [(together, alone) for together, alone in pairs if together is not None and alone is not None]
    said = "Every model is tested on the site’s own held-out records."
    if not both:
        return said
    same = sum(abs(a - b) < 5e-4 for a, b in both)  # alike in the three digits that are shown
    gain = sum(abs(a - b) >= 5e-4 and (a > b) == (METRICS[metric].better == "higher") for a, b in both)
    lone = len(sites) - len(both)
    alike = f", and as well at {same}" if same else ""
    rest = f" At {counted(lone, 'site')} there is no own model to compare with." if lone else ""
    won = f"{gain} of {counted(len(both), 'site')}{alike}"
    ours, other = ("shared", "the site’s own") if kind == "federated" else (kind, "one that the site trains alone")
    return f"{said} By {METRICS[metric].name}, the {ours} model does better than {other} at {won}.{rest}"


def convergence(result: Input, details: Input) -> Section | None:
    """Training loss by step."""
    history = details.get("history") or []
    plot = plots.convergence(history)
    if plot is None:
        return None
    losses = [loss for row in history if (loss := real(row.get("loss"))) is not None]
    went = f"it went from {fixed(losses[0])} to {fixed(losses[-1])} per record"
    words = [text(f"Training makes the loss, which is the model’s error, smaller: {went}.")]
    steps = real(part(result, "model").get("converged_rounds"))
    if steps is not None:
        why = ENDED.get(str(part(result, "output").get("ended_by")), "")
        words.append(text(f"It ended after {counted(int(steps), 'step')}{why}."))
    picture = figure(plot, "Training loss", "mean per record; lower is better")
    return Section("convergence", "Convergence", [beside(picture, *words)])


def coefficients(result: Input, details: Input) -> Section | None:
    """The model's coefficients, with confidence intervals and odds ratios where they exist."""
    model = part(result, "model")
    lines = model.get("table") or [{"name": n, "coefficient": c} for n, c in part(model, "coefficients").items()]
    if not lines:
        return None
    family = part(model, "spec").get("family") or ("logistic" if "auc" in part(result, "metrics", "federated") else "")
    odds, errors = family == "logistic", any(real(row.get("std_error")) is not None for row in lines)
    rows: list[list[Child]] = []
    for row in lines:
        name, c, e = row.get("name"), real(row.get("coefficient")), real(row.get("std_error"))
        unit = unit_of(details, name)
        cells: list[Child] = [join(name, element("small", f"per {unit}") if unit else None), significant(c, 3)]
        if errors:
            cells += [significant(e, 3), _interval(c, e), p_value(row.get("p_value"))]
        if odds:
            cells.append(NOTHING if c is None or name == "intercept" else _odds_ratio(c))
        rows.append(cells)
    words = [
        "A coefficient is what one unit more of the feature adds to the model’s score, the others staying as they are."
    ]
    if odds:
        words.append("The odds ratio is by how much that multiplies the odds: above 1, the outcome is likelier.")
    plot = figure(plots.forest(lines), "Coefficients with 95 % intervals", "each panel has a scale of its own")
    if plot is not None:
        words.append("A hollow dot is a coefficient whose interval includes zero: the data do not settle its sign.")
    header = ["Feature", "Coefficient", *(["Standard error", "95 % interval", "p"] if errors else [])]
    whole_table = table("Coefficients, per unit of the feature", [*header, *(["Odds ratio"] if odds else [])], rows)
    return Section("coefficients", "Coefficients", [beside(plot, *map(text, words)), whole_table])


def _interval(middle: float | None, std_error: float | None) -> str:
    if middle is None or std_error is None:
        return NOTHING
    half = plots.Z_95 * std_error
    return f"{significant(middle - half, 3)} to {significant(middle + half, 3)}"


def _odds_ratio(coefficient: float) -> str:
    if abs(coefficient) > math.log(1000):
        return "> 1000" if coefficient > 0 else "< 0.001"
    return significant(math.exp(coefficient), 4)
