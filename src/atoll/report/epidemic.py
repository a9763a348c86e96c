"""The sections of the epidemic blueprint's daily job: risk and action, outlook, drivers, interventions compared.

What a region keeps to itself is said to be withheld, a region that did not answer to be absent: a total without it is
marked partial wherever it stands.
"""

from __future__ import annotations

from atoll.report import epidemic_found as found_in
from atoll.report import epidemic_plots as plots
from atoll.report.epidemic_found import Day, Found, Interval
from atoll.report.markup import Child, Html, code, element, table
from atoll.report.section import Input, Section, beside, cards, figure, part, terms, text
from atoll.report.words import NOTHING, WITHHELD, compact, counted, fixed, listed, real, whole

MOST_DRIVERS = 10
WHAT_IF = (
    "Each is the same SEIR model, fitted to the cases so far, with its contacts, its travel or its time to isolation "
    "changed from today on. The intervals are of the fit; whether a measure works as assumed, they do not say."
)


def found_of(result: Input) -> Found:
    """What the daily job told; empty where the study is another one."""
    return part(result, "output", "epidemic")


def headline(result: Input) -> str:
    """The outcome in one or two sentences; "" where the study is another one."""
    found = found_of(result)
    joint = part(found, "joint")
    risk = real(joint.get("risk"))
    if risk is None:
        return ""
    level = f", level {joint['level']}" if joint.get("level") else ""
    whose = f"of {_joined(found)}" if _joined(found) else "of all regions together"
    told = f"On {_date(found.get('day'))} the joint risk {whose} is {fixed(risk, 2)} of 1{level}."
    action = f" {_sentence(joint['action'])}" if joint.get("action") else ""
    without = [str(one) for one in found_in.many(found.get("absent"))]
    partial = f" Partial: without {listed(without, 12)}." if without else " Partial." if found.get("partial") else ""
    return told + partial + action


def risk(result: Input, _: Input) -> Section | None:
    """Joint risk, level and action; the map; risk by region and day; alarms; what is missing."""
    found = found_of(result)
    if not found:
        return None
    content = [_missing(found), terms(_tiles(found), "tiles"), _joint(found), *_by_place(found)]
    return Section("risk", "Epidemic risk", content)


def _joint(found: Found) -> Html:
    """The joint risk on its scale, what is suggested, and how the risk is meant."""
    joint = part(found, "joint")
    now, level = real(joint.get("risk")), joint.get("level")
    words: list[Child] = []
    if now is not None and level:
        words.append(text("Suggested level: ", element("strong", level), "."))
    if now is not None and joint.get("action"):
        words.append(text(element("strong", _sentence(joint["action"]))))
    if part(found, "alarms").get("joint"):
        words.append(text("Joint alarm: several regions are in alarm on the same day."))
    words += [text(_formula(found)), element("p", _privacy(part(found, "regions")), class_="note")]
    label = f"Scale from 0 to 1: joint risk {fixed(now, 2)}" + (f", level {level}" if level else "")
    scale = None if now is None else plots.risk_scale(now, found_in.levels(joint), label)
    note = f"on {_date(found.get('day'))}, all regions weighted by population"
    return beside(figure(scale, "Joint risk", note), *words)


def _by_place(found: Found) -> list[Child]:
    """The map, risk by region and day, the joint risk by day, and the regions' table."""
    regions, day = part(found, "regions"), _date(found.get("day"))
    together = found_in.risks(part(found, "joint").get("by_day"))
    label = f"Line: joint risk by day up to {day}"
    line = plots.line_by_day({one: (value, None, None) for one, value in together.items()}, label)
    course = figure(line, "Joint risk by day", "0 to 1")
    shown: dict[str, tuple[float | None, str, bool]] = {
        str(name): (found_in.newest_risk(part(one)), WITHHELD if one is None else NOTHING, bool(part(one).get("alarm")))
        for name, one in regions.items()
    }
    if all(value is None for value, *_ in shown.values()):  # nobody's own is known: nothing for a map
        return [course]
    shown |= {
        str(name): (None, "absent", False) for name in found_in.many(found.get("absent")) if str(name) not in shown
    }
    told = "; ".join(
        f"{name} {missing if value is None else fixed(value, 2)}{', alarm' if alarm else ''}"
        for name, (value, missing, alarm) in shown.items()
    )
    rows: dict[str, dict[Day, float] | None] = {
        str(name): None if one is None else found_in.risks(part(one).get("by_day")) for name, one in regions.items()
    }
    rows |= {"joint": together} if together else {}
    heat = plots.risk_by_day(rows, f"Heat map: risk by region and day up to {day}")
    picture = plots.risk_map(shown, f"Map of risk by region on {day}: {told}")
    pictures = beside(
        figure(picture, f"Risk by region, {day}", "0 to 1, deeper is higher; ▲ alarm. A sketch, not to scale"),
        figure(heat, "Risk by region and day", "deeper is higher; on the right the newest"),
        course,
        top=True,
    )
    return [pictures, _by_region(found)]


def outlook(result: Input, _: Input) -> Section | None:
    """New cases so far, the learned forecast beside the SEIR projection, and R_t."""
    found = found_of(result)
    past, seir, learned, spread = found_in.course(found)
    if not past and not seir and not learned:
        return None
    today = found_in.newest(found, past, seir)
    summed = found_in.summed(seir, sorted({days for days, _ in learned} or {1, 3, 7, 14}), today)
    rows: list[tuple[int, Interval | None, Interval | None]] = [(n, one, summed.get(n)) for n, one in learned]
    rows = rows or [(n, None, one) for n, one in summed.items()]
    newest = spread[max(spread)] if spread else None
    said: list[Child] = []
    if learned:
        days, (mean, low, high) = max((one for one in learned if one[0] <= 7), default=learned[0])
        said.append(text(
            f"The learned forecast expects {_cases(mean)} in the next {counted(days, 'day')}{_between(low, high)}"
            + (f"; the SEIR model {_cases(summed[days][0])}." if days in summed else ".")
        ))  # fmt: skip
    if doubt := part(found, "forecast").get("note"):
        said.append(text(element("strong", _sentence(doubt))))
    if found.get("seir_note"):
        said.append(text(f"The SEIR model says nothing today: {found['seir_note']}."))
    header = ["In the next", "Learned forecast", "SEIR"]
    lines = [[counted(days, "day"), _told(a), _told(b)] for days, a, b in rows]
    label = f"Bars: new cases a day up to {_date(max(past, default=None))}; line: SEIR projection"
    pictures = [
        figure(plots.outlook(past, seir, learned, today, label), "New cases a day",
               _legend(("data", "reported"), ("federated", "learned forecast, mean a day"), ("local", "SEIR"))),
        figure(plots.horizons(rows, "Dots: cases summed over the days ahead, " + "; ".join(
                   f"{days} days: learned {_told(a)}, SEIR {_told(b)}" for days, a, b in rows)),
               "Cases summed over the days ahead", _legend(("federated", "learned"), ("local", "SEIR"))),
    ]  # fmt: skip
    spreads: list[Child] = []
    if newest is not None:
        way = "growing" if newest[0] > 1 else "shrinking"
        sure = newest[1] is not None and newest[2] is not None and (newest[1] > 1 or newest[2] < 1)
        spreads.append(text(
            f"Each case now leads to {fixed(newest[0], 2)} further ones{_between(newest[1], newest[2], 2)}: the "
            f"epidemic is {way}{'' if sure else ', though the interval holds 1'}."
        ))  # fmt: skip
    course = figure(
        plots.line_by_day(spread, f"Line: reproduction number R_t by day, {_told(newest, 2)} on the newest", mark=1.0),
        "Reproduction number R_t", "cases that one case leads to; below the dashed 1 the epidemic shrinks",
    )  # fmt: skip
    note = (
        "New confirmed cases of all regions that took part, with intervals; SEIR’s add up those of its days, and so "
        "are wider than need be. Neither model knows of measures to come."
    )
    expected = table("Cases expected in all regions", header, lines, note=note) if rows else None
    return Section(
        "outlook", "Outlook", [*said, cards(pictures), expected, beside(course, *spreads) if spread else None]
    )


def drivers(result: Input, _: Input) -> Section | None:
    """Features by the mean of their |SHAP|."""
    ranked = [
        (str(one.get("feature")), value)
        for one in found_in.mappings(found_of(result).get("drivers"))
        if (value := real(one.get("importance"))) is not None
    ]
    if not ranked:
        return None
    ranked.sort(key=lambda pair: -pair[1])
    total = sum(value for _, value in ranked) or 1.0
    shown = ranked[:MOST_DRIVERS]
    bars = plots.ranked([(name, value / total) for name, value in shown], "share of mean |SHAP|")
    first = listed([name for name, value in shown[:3] if value > 0])
    words: list[Child] = [
        text("What moves today’s forecasts most: ", element("strong", first), "."),
        text("Each bar is a feature’s share of the mean absolute SHAP value, summed over the regions’ rows. It says "
             "what the model leans on, not what causes cases."),
    ]  # fmt: skip
    if len(ranked) > len(shown):
        words.append(element("p", f"The first {len(shown)} of {len(ranked)} features.", class_="note"))
    return Section("drivers", "Drivers", [beside(figure(bars, "Ranked drivers", "share of mean |SHAP|"), *words)])


def interventions(result: Input, _: Input) -> Section | None:
    """Cases under each intervention on the SEIR twin, and how many it averts."""
    found = found_of(result)
    rows = [(one, name, known) for one in found_in.mappings(found.get("interventions"))
            if (name := str(one.get("name") or "")) and (known := found_in.interval(one, "cases"))]  # fmt: skip
    if not rows:
        return _links(found)
    label = "Dots: cases under each intervention. " + "; ".join(f"{name} {_told(known)}" for _, name, known in rows)
    lines = [
        [name, one.get("effect") or NOTHING, *_pair(known), _averted(one)] for one, name, known in rows
    ]  # fmt: skip
    best = max(((real(one.get("averted")) or 0.0, name) for one, name, _ in rows), default=(0.0, ""))
    said = f"Of these, {best[1]} averts most: {_cases(best[0])}." if best[0] > 0 else "None of these averts cases."
    days = real(found.get("interventions_days"))
    over = f" over {whole(days)} days" if days else ""
    return Section("interventions", "Interventions compared", [
        beside(figure(plots.compared([(name, known) for _, name, known in rows], label), f"Cases{over} under each",
                      "with intervals; dashed: the first"), text(said), text(WHAT_IF)),
        table(f"Interventions on the SEIR twin: new cases{over}",
              ["Intervention", "What changes", "Cases", "Interval", "Averted"], lines, text_columns=2),
        *(_links(found) or Section("", "", ())).content,
    ])  # fmt: skip


def _links(found: Found) -> Section | None:
    links = part(found, "links")
    shared, note = real(links.get("shared")), links.get("note")
    if shared is None and not note:
        return None
    counts = f"{counted(int(shared), 'case link')} shared between regions. " if shared is not None else ""
    return Section("links", "Links between regions", [element("p", counts, note, class_="note")])


def _tiles(found: Found) -> list[tuple[Child, Child]]:
    joint, alarms = part(found, "joint"), part(found, "alarms")
    _, _, learned, spread = found_in.course(found)
    week = next((one for one in learned if one[0] == 7), learned[-1] if learned else None)
    tiles: list[tuple[Child, Child]] = []
    if (value := real(joint.get("risk"))) is not None:
        tiles.append(("joint risk", fixed(value, 2)))
    if joint.get("level"):
        tiles.append(("level", str(joint["level"])[:14]))
    if week is not None:
        tiles.append((f"cases in {counted(week[0], 'day')}", _short(week[1][0])))
    if spread:
        tiles.append(("R_t", fixed(spread[max(spread)][0], 2)))
    if real(alarms.get("regions")) is not None:
        tiles.append(("regions in alarm", whole(alarms["regions"])))
    if real(alarms.get("cities")) is not None:
        of = real(alarms.get("of_cities"))
        tiles.append(("cities in alarm", whole(alarms["cities"]) + (f" of {whole(of)}" if of else "")))
    if real(joint.get("population")) is not None:
        tiles.append(("residents", compact(joint["population"])))
    return tiles


def _missing(found: Found) -> Html | None:
    """What is partial, late or withheld, said before anything else; None where all is there."""
    absent, late = ([str(one) for one in found_in.many(found.get(key))] for key in ("absent", "late"))
    said = []
    if absent or found.get("partial"):
        counted_out = f"{listed(absent, 12)} {'is' if len(absent) == 1 else 'are'} not counted"
        who = counted_out if absent else "not every region is counted"
        said.append(f"Partial: {who}. All totals, and the joint risk, are of those present.")
    if late:
        has = "has" if len(late) == 1 else "have"
        said.append(
            f"Late: {listed(late, 12)} {has} no data of this day yet, or of fewer cities than lately, and counted with "
            "the newest there was."
        )
    told: list[Child] = [element("p", element("strong", one)) for one in said]
    for one in found_in.mappings(found.get("problems")):
        remedy = f" Remedy: {one['remedy']}." if one.get("remedy") else ""
        told.append(element("p", f"{one.get('site')}: {one.get('message')}.{remedy} ", code(one.get("code") or "")))
    return element("div", told, class_="promise", role="note") if told else None


def _formula(found: Found) -> str:
    days, ceiling = real(found.get("window_days")), real(found.get("ceiling_per_100k"))
    if days is None or ceiling is None:
        return ""
    return (
        f"A region’s risk is its mean predicted new cases a day over {counted(int(days), 'day')}, per 100,000 "
        f"residents, as a share of {ceiling:g}, and at most 1. The joint risk weights regions by their "
        "residents."
    )


def _privacy(regions: Found) -> str:
    kept = [str(name) for name, one in regions.items() if one is None]
    present = len(regions) - len(kept)
    if kept and not present:
        return "No region shares its own risk: only sums over all of them were seen."
    if kept:
        one = len(kept) == 1
        shares = "shares no values of its own: it is" if one else "share no values of their own: they are"
        return f"{listed(kept, 12)} {shares} in the sums only."
    return (
        "Each region shown shares its own risk by its policy." if present else "Only sums over all regions were seen."
    )


def _by_region(found: Found) -> Html | None:
    regions = part(found, "regions")
    lines: list[list[Child]] = []
    horizons = sorted({days for one in regions.values() for days, _ in found_in.forecasts(part(one).get("forecast"))})
    week = 7 if 7 in horizons else horizons[-1] if horizons else None
    for name, one in regions.items():
        if one is None:
            lines.append([name, WITHHELD, NOTHING, NOTHING, NOTHING])
            continue
        told = part(one)
        ahead = dict(found_in.forecasts(told.get("forecast"))).get(week) if week else None
        alarm = "no" if told.get("alarm") is False else NOTHING
        if told.get("alarm"):
            alarm = f"since {_short_date(told['alarm_since'])}" if told.get("alarm_since") else "yes"
        lines.append([name, told.get("level") or NOTHING, alarm, fixed(found_in.newest_risk(told), 2), _told(ahead)])
    lines += [
        [str(name), "absent", *[NOTHING] * 3] for name in found_in.many(found.get("absent")) if str(name) not in regions
    ]
    if not lines:
        return None
    cases = f"Cases in {counted(week, 'day')}" if week else "Cases"
    return table("Regions", ["Region", "Level", "Alarm", "Risk", cases], lines)


def _averted(one: Found) -> str:
    value, low, high = (real(one.get(key)) for key in ("averted", "averted_low", "averted_high"))
    return NOTHING if value is None else whole(value) + (f" ({whole(low)} to {whole(high)})" if low is not None else "")


def _pair(one: Interval | None) -> list[Child]:
    if one is None:
        return [NOTHING, NOTHING]
    mean, low, high = one
    return [whole(mean), NOTHING if low is None or high is None else f"{whole(low)} to {whole(high)}"]


def _told(one: Interval | None, places: int = 0) -> str:
    return NOTHING if one is None else fixed(one[0], places) + _between(one[1], one[2], places)


def _between(low: float | None, high: float | None, places: int = 0) -> str:
    return "" if low is None or high is None else f" ({fixed(low, places)} to {fixed(high, places)})"


def _cases(value: float) -> str:
    return counted(round(value), "new case")


def _short(value: float) -> str:
    return whole(value) if value < 1e5 else compact(round(value))


def _legend(*keys: tuple[str, str]) -> Html:
    said = [element("span", element("span", class_=f"key {kind}"), name, " ") for kind, name in keys]
    return element("span", [child for i, one in enumerate(said) for child in ([" · ", one] if i else [one])])


def _joined(found: Found) -> str:
    present = [str(name) for name in part(found, "regions") if name not in found_in.many(found.get("absent"))]
    return listed(present, 6) if present else ""


def _sentence(words: object) -> str:
    said = str(words).strip()
    return said[:1].upper() + said[1:] + ("" if said.endswith((".", "!", "?")) else ".")


def _short_date(value: object) -> str:
    day = found_in.day_of(value)
    return str(value) if day is None else plots.short(day)


def _date(value: object) -> str:
    day = found_in.day_of(value)
    return str(value) if day is None and value else "the newest day" if day is None else f"{day.day} {day:%B %Y}"
