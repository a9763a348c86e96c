"""The report's sections about models of trees: what they ask for, the first of them, and what moves predictions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atoll.report import charts, svg
from atoll.report.markup import Child, Html, element, table
from atoll.report.plots import WIDTH
from atoll.report.section import Input, Section, beside, cards, figure, part, text, unit_of
from atoll.report.svg import FEDERATED, INK, MUTED, plain_axes, render, shortened
from atoll.report.words import counted, listed, percent, real, significant, whole

MOST_BARS = 15
MOST_ROWS = 100
NO_CAUSE = "This says what the model leans on, not what causes the outcome."
Node = Mapping[str, Any]


def trees(result: Input, _: Input) -> Section | None:
    """Importance of the features by gain, splits and cover; and the first trees."""
    told = part(result, "model", "trees")
    found = [one for one in told.get("importance") or [] if isinstance(one, Mapping)]
    if not told:
        return None
    outputs = int(real(told.get("outputs")) or 1)
    each = f", one for each of {outputs} classes in every step" if outputs > 1 else ""
    words = [
        text(f"The model adds up {counted(int(real(told.get('trees')) or 0), 'tree')}{each}, with "
             f"{counted(int(real(told.get('leaves')) or 0), 'leaf', 'leaves')} in all."),
    ]  # fmt: skip
    drawn = [one for one in told.get("drawn") or [] if isinstance(one, Mapping) and part(one, "root").get("feature")]
    pictures = [
        figure(_drawing(one["root"]), f"Tree {int(real(one.get('tree')) or 0) + 1}", "upwards: yes") for one in drawn
    ]
    if pictures:
        pictures_of = (
            "A drawn tree begins on the left; a line is the thicker the more rows go along it. What it ends in is "
            "added to the score."
        )
    content: list[Child] = []
    if found:
        by = "gain" if sum(real(one.get("gain")) or 0.0 for one in found) > 0 else "splits"
        content = _ranked(found, by, words)
    else:
        content = [*words, text("No split was worth making: it predicts the same for everybody.")]
    return Section("trees", "Trees", [*content, *([text(pictures_of)] if pictures else []), cards(pictures)])


def _ranked(found: Sequence[Node], by: str, words: Sequence[Html]) -> list[Child]:
    total = {name: sum(real(one.get(name)) or 0.0 for one in found) for name in ("gain", "splits", "cover")}
    ranked = sorted(found, key=lambda one: -(real(one.get(by)) or 0.0))
    shares = [(one.get("feature"), (real(one.get(by)) or 0.0) / (total[by] or 1.0)) for one in ranked[:MOST_BARS]]
    bars = charts.bars(shares, f"share of {by}", form=lambda share: percent(share, 1))
    meant = {
        "gain": "the share of what all splits took off the training loss that a feature’s splits took off",
        "splits": "the share of all splits that ask for a feature",
    }
    first = listed([name for name, _ in shares[:3]])
    said = text("It leans most on ", element("strong", first), f". Importance is {meant[by]}. {NO_CAUSE}")
    rows: list[list[Child]] = [
        [one.get("feature"), percent(one.get("gain"), total["gain"]), whole(one.get("splits")),
         percent(one.get("cover"), total["cover"])]
        for one in ranked[:MOST_ROWS]
    ]  # fmt: skip
    few = f"The first {MOST_ROWS} of {len(ranked)} features." if len(ranked) > MOST_ROWS else None
    note = "Cover is the share of the rows (weighed by the loss’s curvature) that pass a feature’s splits."
    header = ["Feature", "Gain", "Splits", "Cover"]
    return [
        beside(figure(bars, "Importance", f"share of {by}"), *words, said),
        table("Features by what their splits do", header, rows, note=[note, " ", few] if few else note),
    ]


def explanation(result: Input, details: Input) -> Section | None:
    """What moves the predictions of all sites' rows: mean |SHAP|, and its course along a feature's values."""
    told = part(result, "output", "explanation")
    found = [
        (str(one.get("feature")), value)
        for one in told.get("drivers") or []
        if isinstance(one, Mapping) and (value := real(one.get("importance"))) is not None
    ]
    if not found:
        return None
    bars = charts.bars(found[:MOST_BARS], "mean |SHAP|", form=lambda value: significant(value, 3))
    rows = real(told.get("rows"))
    of = f", over {whole(rows)} rows" if rows is not None else ""
    words = [
        text("What moves the predictions most: ", element("strong", listed([name for name, _ in found[:3]])), "."),
        text(f"Each bar is the mean size of what a feature adds to the model’s score, up or down{of} (SHAP values; "
             f"only sums over rows left the sites). {NO_CAUSE}"),
    ]  # fmt: skip
    pictures = [
        figure(_course(name, course, unit_of(details, name)), name, unit_of(details, name) or None)
        for name, _ in found[:6]
        if (course := part(told, "dependence", name))
    ]
    few = f"The first {MOST_BARS} of {len(found)} features." if len(found) > MOST_BARS else None
    content: list[Child] = [beside(figure(bars, "Drivers", "mean |SHAP|"), *words)]
    if few:
        content.append(element("p", few, class_="note"))
    if any(pictures):
        content.append(text("Along each feature’s values: what it adds to the score, on average."))
    return Section("explanation", "What moves the predictions", [*content, cards(pictures)])


def _course(name: str, course: Mapping[str, Any], unit: str) -> Html | None:
    """Mean SHAP by bin: {"bins": [names], "rows" and "mean": [numbers, None where withheld]}, without empty bins."""
    bins, rows, means = (list(course.get(key) or []) for key in ("bins", "rows", "mean"))
    named = [re.sub(r"(^|to )-(?=\d)", r"\1−", str(one)) for one in bins]
    pairs = [(one, mean) for one, n, mean in zip(named, rows, means, strict=False) if n != 0]
    of = f" in {unit}" if unit else ""
    return charts.bars(pairs, f"mean SHAP of {name}{of}", form=lambda value: significant(value, 2)) if pairs else None


def _question(node: Node) -> str:
    name = shortened(node.get("feature"), 14)
    if "right" in node:
        return f"{name}: {shortened(', '.join(map(str, node['right'] or [])), 12)}"
    return f"{name} < {significant(node.get('below'), 3)}"


def _sides(node: Node) -> list[Node]:
    """[where the question is answered by yes, no]: codes that are named go right, values below a threshold left."""
    sides = [one for one in node.get("children") or [] if isinstance(one, Mapping)]
    return sides[::-1] if "right" in node else sides


def _drawing(root: Node) -> Html | None:
    """The first levels of a tree, from left to right."""
    height, cover = _height(root), real(root.get("cover")) or 0.0

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        axes.set(xticks=[], yticks=[], xlim=(-0.02, 3.0), ylim=(height - 0.5, -0.5))
        _branch(axes, root, 0, 0.0, cover)

    return render(WIDTH, 20 + 34 * height, f"Tree: {_told(root)}", paint)


def _told(node: Node) -> str:
    if not node.get("feature"):
        return f"add {significant(node.get('value'), 3)}"
    sides = [_told(side) for side in _sides(node)]
    return f"{_question(node)}? " + (f"yes: {sides[0]}; no: {sides[1]}" if len(sides) == 2 else "…")


def _height(node: Node) -> int:
    return sum(_height(side) for side in _sides(node)) or 1


def _branch(axes: Axes, node: Node, level: int, top: float, cover: float) -> float:
    """Draw a node and what is below it, from line *top* on; returns its own line."""
    sides, line = _sides(node), top + (_height(node) - 1) / 2
    for side in sides:
        below = _branch(axes, side, level + 1, top, cover)
        top += _height(side)
        share = (real(side.get("cover")) or 0.0) / cover if cover > 0 else 0.0
        width = 0.8 + 5 * min(max(share, 0.0), 1.0)
        axes.plot([level + 0.1, level + 1], [line, below], color=MUTED, linewidth=width, alpha=0.45, zorder=1)
    leaf = not node.get("feature")
    said = significant(node.get("value"), 3) if leaf else _question(node) + ("" if sides else " …")
    axes.text(
        level, line, said, va="center", color=FEDERATED if leaf else INK, fontsize=svg.TEXT_SIZE - 1.5,
        bbox={"facecolor": svg.CARD, "edgecolor": "none", "pad": 1.2}, zorder=2,
    )  # fmt: skip
    return line
