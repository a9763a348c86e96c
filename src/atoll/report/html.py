"""The report of a run: one HTML file that needs nothing else, to be read by people.

No script, no address, no request: style and plots are in the file, and a content security
policy in its head forbids the browser everything else. It reads on a phone, in light and
dark mode, and on paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from atoll.report import (
    association,
    distributions,
    epidemic,
    groups,
    model,
    record,
    scorecard,
    sentences,
    stream,
    trees,
    trust,
    value,
)
from atoll.report.markup import Child, Html, code, element
from atoll.report.section import Input, Maker, part, terms, unit_of
from atoll.report.svg import distinct
from atoll.report.words import NOTHING, counted, duration, fixed, listed, moment, real, significant, size, whole

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SECTIONS: tuple[Maker, ...] = (
    epidemic.risk,
    epidemic.outlook,
    epidemic.drivers,
    epidemic.interventions,
    model.results,
    model.by_site,
    value.site_value,
    model.convergence,
    stream.stream,
    trust.trust,
    model.coefficients,
    trees.trees,
    trees.explanation,
    record.statistics,
    distributions.distributions,
    distributions.missing,
    scorecard.evidence,
    association.correlation,
    association.collinearity,
    association.components,
    association.crosstables,
    groups.group_by,
    groups.tests,
    groups.survival,
    scorecard.drift,
    scorecard.quality,
    record.preparation,
    record.releases,
    record.traffic,
    record.verification,
)
TRANSPORTS = {
    "local": "as a rehearsal: all sites in one process, on one machine",
    "grpc": "over the network: one process per party, mutual TLS",
}
IN_WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")


def write_report(path: Path, result: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write the report of one run to *path*, as UTF-8.

    result: what ``result.json`` holds. details: history, curves, units, purpose, rounds,
    releases, created, versions. Parts that are absent, empty or not finite are left out of
    the page or shown as "–". The same input gives the same bytes.
    """
    path.write_bytes(page(result, details).encode())


def head_of(title: str) -> Html:
    """The head of a self-contained page: its style, and a policy that lets nothing be fetched."""
    style = resources.files("atoll.report").joinpath("report.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        Html(f"<style>\n{style}</style>"),
    )


def page(result: Input, details: Input) -> str:
    """The whole page, as text; see :func:`write_report`."""
    study = result.get("study") or "study"
    parts = [record.noisy(result, made) for make in SECTIONS if (made := make(result, details)) is not None]
    head = head_of(f"{study} – Atoll study report")
    links = [element("li", element("a", made.title, href=f"#{made.anchor}")) for made in parts]
    nav = element("nav", element("ul", links), aria_label="Contents")
    main = distinct(element("main", [made.html() for made in parts]))
    columns = element("div", nav, main, class_="columns")
    body = element("body", _masthead(study, result, details), columns, _footer(result, details))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _masthead(study: object, result: Input, details: Input) -> Html:
    """Study, outcome, key figures, what protects people, and who, what and how."""
    sites, found = part(result, "sites"), part(result, "metrics", "personal") or part(result, "metrics", "federated")
    tiles: list[tuple[Child, Child]] = [
        ("sites", whole(len(sites)) if sites else NOTHING),
        ("rows in all", whole(_rows(result))),
        ("AUC", fixed(found.get("auc"))),
        ("accuracy", fixed(found.get("accuracy")) if found.get("auc") is None else NOTHING),
        ("R²", fixed(found.get("r2"))),
        ("round" if result.get("rounds") == 1 else "rounds", whole(result.get("rounds"))),
        ("left the sites", size(part(result, "wire").get("from_sites_bytes"))),
        ("time", duration(result.get("seconds"))),
    ]
    named = [_with_rows(name, part(site).get("rows")) for name, site in sites.items()]
    transport = str(result.get("transport") or "")
    facts: list[tuple[Child, Child]] = [
        ("Purpose", details.get("purpose")),
        ("Took part", listed(named, 12) if sites else None),
        ("Computation", _code(result.get("program"))),
        ("Ran", TRANSPORTS.get(transport, transport)),
        ("Written", moment(details["created"]) if details.get("created") else None),
    ]
    return element(
        "header",
        element("p", "Atoll · study report", class_="eyebrow"),
        element("h1", study),
        element("p", outcome(result, details), class_="lede"),
        terms([(name, value) for name, value in tiles if value != NOTHING], "tiles"),
        record.promise(result),
        terms(facts, "facts two"),
    )


def _with_rows(name: str, rows: object) -> str:
    return name if real(rows) is None else f"{name} ({whole(rows)} rows)"


def _code(value: object) -> Html | None:
    missing = value in (None, "") or (isinstance(value, float) and real(value) is None)
    return None if missing else code(value)


def _rows(result: Input) -> float | None:
    """Rows of all sites; None when a site did not tell and no statistics count them."""
    told = [real(part(site).get("rows")) for site in part(result, "sites").values()]
    known = [rows for rows in told if rows is not None]
    return sum(known) if known and len(known) == len(told) else real(part(result, "statistics").get("rows"))


def outcome(result: Input, details: Input) -> str:
    """The outcome in one sentence."""
    if said := epidemic.headline(result):
        return said
    own, pooled = part(result, "metrics", "personal"), part(result, "metrics", "pooled")
    found = own or part(result, "metrics", "federated")
    sites, columns = len(part(result, "sites")), part(result, "statistics", "columns")
    many = IN_WORDS[sites] if sites < len(IN_WORDS) else f"{sites:,}"
    together = f"{many} sites trained one model without pooling their records" if sites > 1 else "A model was trained"
    if own:
        together = f"{many} sites learned together without pooling their records, and each has a model of its own"
    auc, mae = real(found.get("auc")), real(found.get("mae"))
    if auc is not None:
        who = "they rank" if own else "it ranks"
        ranks = f"{who} a positive record above a negative one in {100 * auc:.0f} of 100 pairs (AUC {auc:.3f})"
        return f"{together}: on records kept aside for testing, {ranks}{_against(auc, pooled.get('auc'))}."
    if mae is not None:
        unit = model.target_unit(result, details)
        whose = "their" if own else "its"
        off = f"{whose} predictions are off by {significant(mae, 3)}{' ' + unit if unit else ''} on average"
        return f"{together}: on records kept aside for testing, {off}{_against(mae, pooled.get('mae'))}."
    right = real(found.get("accuracy"))
    if right is not None:
        who = "they are" if own else "it is"
        told = f"{who} right about {100 * right:.0f} of 100 (accuracy {right:.3f})"
        return f"{together}: of records kept aside for testing, {told}{_against(right, pooled.get('accuracy'))}."
    if part(result, "model"):
        return f"{together}. It was not scored on records kept aside."
    who = f"{many} {'site' if sites == 1 else 'sites'}"
    rows, found_out = _rows(result), part(result, "output")
    records = "" if rows is None else f" ({whole(rows)} in all)"
    if said := sentences.outcome(found_out, who, records, lambda column: unit_of(details, column)):
        return said
    if columns:
        where = f" at {counted(sites, 'site')}" if sites else ""
        return f"{whole(_rows(result))} records{where}, described together in {counted(len(columns), 'column')}."
    return f"The study finished after {counted(int(real(result.get('rounds')) or 0), 'round')}."


def _against(value: float, pooled: object) -> str:
    """How the pooled model compares, to the three digits that are shown."""
    other = real(pooled)
    if other is None:
        return ""
    if significant(value, 3) == significant(other, 3):
        return ", the same as a model trained on all records in one place"
    return f"; a model trained on all records in one place reaches {significant(other, 3)}"


def _footer(result: Input, details: Input) -> Html:
    """What identifies the study and the software."""
    versions = ", ".join(f"{name} {version}" for name, version in part(details, "versions").items())
    lines: list[tuple[Child, Child]] = [
        ("Plan hash", _code(result.get("plan_hash"))),
        ("Run", _code(result.get("run"))),
        ("Seed", _code(result.get("seed"))),
        ("Versions", versions),
    ]
    closing = element("p", "This page runs no script and loads nothing.", class_="note")
    return element("footer", terms(lines, "facts"), closing)
