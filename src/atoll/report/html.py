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

from atoll.report import sections
from atoll.report.markup import Html, code, element, join
from atoll.report.words import NOTHING, counted, duration, fixed, listed, moment, real, significant, size, whole

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TRANSPORTS = {
    "local": "a rehearsal: all sites in one process, on one machine",
    "grpc": "over the network, one process per party, mutual TLS",
}


def write_report(path: Path, result: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write the report of one run to *path*, as UTF-8.

    result: what ``result.json`` holds. details: history, curves, units, purpose, rounds,
    releases, created, versions. Parts that are absent, empty or not finite are left out of
    the page or shown as "–". The same input gives the same bytes.
    """
    path.write_bytes(page(result, details).encode())


def page(result: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The whole page, as text; see :func:`write_report`."""
    study = result.get("study") or "study"
    parts = [part for make in sections.ALL if (part := make(result, details)) is not None]
    style = resources.files("atoll.report").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", study, " – Atoll study report"),
        Html(f"<style>\n{style}</style>"),
    )
    links = [element("li", element("a", part.title, href=f"#{part.anchor}")) for part in parts]
    body = element(
        "body",
        _masthead(study, result, details),
        element(
            "div",
            element("nav", element("ul", links), aria_label="Contents") if links else None,
            element("main", [part.html() for part in parts]),
            class_="columns",
        ),
        _footer(result, details),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _masthead(study: object, result: Mapping[str, Any], details: Mapping[str, Any]) -> Html:
    sites = result.get("sites") or {}
    rows = [real(site.get("rows")) for site in sites.values()]
    everything = sum(n for n in rows if n is not None) if rows and None not in rows else _rows(result)
    wire = result.get("wire") or {}
    tiles = [
        ("sites", whole(len(sites)) if sites else NOTHING),
        ("rows in all", whole(everything)),
        *_scores(result),
        ("rounds", whole(result.get("rounds"))),
        ("left the sites", size(wire.get("from_sites_bytes"))),
        ("time", duration(result.get("seconds"))),
    ]
    transport = str(result.get("transport") or "")
    facts = [
        ("Purpose", details.get("purpose")),
        ("Took part", listed(list(sites), 12) if sites else None),
        ("Computation", code(result["program"]) if result.get("program") else None),
        ("Protection", code(result["protection"]) if result.get("protection") else None),
        ("Ran", TRANSPORTS.get(transport, transport)),
        ("Written", moment(details["created"]) if details.get("created") else None),
    ]
    return element(
        "header",
        element("p", "Atoll · study report", class_="eyebrow"),
        element("h1", study),
        element("p", outcome(result, details), class_="lede"),
        element(
            "dl", [element("div", element("dt", t), element("dd", v)) for t, v in tiles if v != NOTHING], class_="tiles"
        ),
        element("dl", [element("div", element("dt", t), element("dd", v)) for t, v in facts if v], class_="facts"),
    )


def _rows(result: Mapping[str, Any]) -> object:
    return (result.get("statistics") or {}).get("rows")


def _scores(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = (result.get("metrics") or {}).get("federated") or {}
    if real(found.get("auc")) is not None:
        return [("AUC", fixed(found["auc"]))]
    return [("R²", fixed(found["r2"]))] if real(found.get("r2")) is not None else []


def outcome(result: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The outcome in one sentence."""
    metrics = result.get("metrics") or {}
    found, pooled = metrics.get("federated") or {}, metrics.get("pooled") or {}
    sites = len(result.get("sites") or {})
    together = (
        f"{counted(sites, 'site')} trained one model without pooling their records" if sites else "A model was trained"
    )
    auc, mae = real(found.get("auc")), real(found.get("mae"))
    if auc is not None:
        best = f"it ranks a positive record above a negative one in {100 * auc:.0f} of 100 pairs (AUC {auc:.3f})"
        return f"{together}: on records kept aside for testing, {best}{_against(auc, real(pooled.get('auc')))}."
    if mae is not None:
        target = str(((result.get("model") or {}).get("spec") or {}).get("target", ""))
        unit = (details.get("units") or {}).get(target, "")
        best = f"its predictions are off by {significant(mae, 3)}{' ' + unit if unit else ''} on average"
        return f"{together}: on records kept aside for testing, {best}{_against(mae, real(pooled.get('mae')))}."
    if result.get("model"):
        return f"{together}; it was not scored on records kept aside."
    columns = (result.get("statistics") or {}).get("columns")
    if columns:
        where = f" at {counted(sites, 'site')}" if sites else ""
        return f"{whole(_rows(result))} records{where}, described together in {counted(len(columns), 'column')}."
    return f"The study finished after {counted(int(real(result.get('rounds')) or 0), 'round')}."


def _against(value: float, pooled: float | None) -> str:
    if pooled is None:
        return ""
    if abs(value - pooled) <= 5e-4 * max(abs(pooled), 1e-12):
        return ", the same as a model trained on all records in one place"
    return f"; a model trained on all records in one place reaches {significant(pooled, 3)}"


def _footer(result: Mapping[str, Any], details: Mapping[str, Any]) -> Html:
    versions = details.get("versions") or {}
    lines = [
        ("Plan hash", code(result["plan_hash"]) if result.get("plan_hash") else None),
        ("Run", code(result["run"]) if result.get("run") else None),
        ("Seed", code(result["seed"]) if result.get("seed") is not None else None),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return element(
        "footer",
        element("dl", [element("div", element("dt", t), element("dd", v)) for t, v in lines if v], class_="facts"),
        join(element("p", "This page holds no record of any person, runs no script and loads nothing.", class_="note")),
    )
