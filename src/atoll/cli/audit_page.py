"""audit.html: what the attacks got, in one file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from atoll.report.markup import Html, element, table

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(found: Mapping[str, Any], sheets: Sequence[tuple[str, bytes]]) -> str:
    """The page of what :func:`atoll.cli.audit_plan.audit_plan` found. sheets: (title, PNG)."""
    style = resources.files("atoll.report").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", found["study"], " – Atoll audit"),
        Html(f"<style>\n{style}</style>"),
    )
    privacy = found["privacy"]
    under = found["protection"] + (f", ε {privacy['epsilon']:g} of one {privacy['unit']}" if privacy else "")
    sites = f"{len(found['sites'])} site" + "s" * (len(found["sites"]) != 1)
    facts = (
        f"{found['program']} under {under}, {sites}. A row counts as reconstructed by: {found['criterion']}. "
        f"Seed {found['seed']}. Plan {found['plan_hash']}."
    )
    main = element(
        "main",
        element("h1", f"{found['study']}: {found['leak_rate']:.1%} leaked"),
        element("p", facts),
        table("Reconstruction", COLUMNS, lines(found), text_columns=3, note=" ".join(found["notes"])),
        [element("figure", _picture(png, title), element("figcaption", title)) for title, png in sheets],
        _membership(found["membership"]),
        _dp(found["dp"]),
    )
    return f"<!doctype html>\n{element('html', head, element('body', main), lang='en')}\n"


COLUMNS = ("batch", "what is seen", "attack", "attacked", "reconstructed", "leak rate", "95 %")


def lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line for each batch size, view and attack (see COLUMNS)."""
    told: list[tuple[str, ...]] = []
    for batch in found["batches"]:
        views = [*batch["views"].items(), ("nothing", [batch["no_gradient"]])]
        for view, leak in ((view, leak) for view, leaks in views for leak in leaks):
            low, high = leak["interval"]
            told.append((str(batch["batch"]), view, leak["attack"], str(leak["attacked"]), str(leak["reconstructed"]),
                         f"{leak['leak_rate']:.1%}", f"{low:.1%} – {high:.1%}"))  # fmt: skip
    return told


def membership_lines(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(attack, AUC, share of members found at 1 % false alarms)."""
    attacks = found.get("attacks", {}).items()
    return [(name, f"{one['auc']:.3f}", f"{one['tpr_at_1_fpr']:.1%}") for name, one in attacks]


def dp_sentence(found: Mapping[str, Any]) -> str:
    """The empirical bound beside the claim."""
    bound, claim = found["epsilon_at_least"], found["claimed_of_release"]
    verdict = "within" if found["holds"] else "ABOVE"
    return (
        f"canaries show ε ≥ {bound:.3g} for one release: {verdict} the claimed {claim:.3g}"
        f" (whole plan: {found['claimed_of_plan']:g}, δ {found['delta']:g})"
    )


def _picture(png: bytes, title: str) -> Html:
    """An img element; its bytes are in the page."""
    source = base64.b64encode(png).decode()
    opened = element("img", src=f"data:image/png;base64,{source}", alt=f"{title}: true and reconstructed", style=WIDTH)
    return Html(opened.removesuffix("</img>"))


WIDTH = "max-width: 100%; height: auto"


def _membership(found: Mapping[str, Any] | None) -> Html | None:
    if not found:
        return None
    if "skipped" in found:
        return element("p", f"Membership was not tested: {found['skipped']}.")
    note = f"{found['members']} members, {found['others']} others; an AUC of 0.5 is chance."
    return table("Membership", ("attack", "AUC", "found at 1 % false alarms"), membership_lines(found), note=note)


def _dp(found: Mapping[str, Any] | None) -> Html | None:
    return element("p", f"Differential privacy: {dp_sentence(found)}.") if found else None
