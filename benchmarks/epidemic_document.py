"""What ``docs/epidemic.md`` shows, from files.

``python -m benchmarks.epidemic_document backtest epidemic.json`` prints the backtest's tables in short, as Markdown.
``python -m benchmarks.epidemic_document picture DAY/result.json SVG`` draws the core of a day's report as one picture:
the map, risk by region and day, cases with both forecasts, and R_t, in the page's own colours, light or dark.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from atoll.report import epidemic

DRAWN = re.compile(r"<figure><figcaption><strong>(.*?)</strong>.*?</figcaption>(<svg .*?</svg>)</figure>", re.DOTALL)
CHOSEN = ("Risk by region,", "Risk by region and day", "New cases a day", "Reproduction number")
WIDTH, GAP, HEAD = 340.0, 28.0, 26.0


def picture(result: dict[str, Any]) -> str:
    """The drawing, as a file of its own."""
    made = [maker(result, {}) for maker in (epidemic.risk, epidemic.outlook)]
    found = {title: drawn for section in made if section for title, drawn in DRAWN.findall(section.html())}
    shown = [(title, drawn) for start in CHOSEN for title, drawn in found.items() if title.startswith(start)]
    parts, bottoms = list[str](), [GAP / 2, GAP / 2]
    for title, drawn in shown:
        column = 0 if bottoms[0] <= bottoms[1] else 1
        x, y = GAP / 2 + column * (WIDTH + GAP), bottoms[column]
        height = float(re.findall(r'height="([\d.]+)"', drawn)[0])
        parts.append(f'<text x="{x:g}" y="{y + 14:g}" class="title">{title}</text>')
        parts.append(drawn.replace("<svg ", f'<svg x="{x:g}" y="{y + HEAD:g}" ', 1))
        bottoms[column] = y + HEAD + height + GAP
    width, height = 2 * WIDTH + 2 * GAP, max(bottoms)
    css = resources.files("atoll.report").joinpath("report.css").read_text(encoding="utf-8")
    colours = css[css.index(":root") : css.index("* {")].replace("@media screen and", "@media")
    title = ".title { font-size: 13px; font-weight: 620; fill: var(--ink); }"
    style = f"{colours}\ntext {{ font-family: var(--sans); }} {title}"
    label = html.escape(epidemic.headline(result))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{label}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" rx="10" fill="var(--card)"/>\n'
        + "\n".join(parts) + "\n</svg>\n"
    )  # fmt: skip


def number(value: float) -> str:
    """Three digits, and all of a larger one's whole part."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def told_of(row: dict[str, Any]) -> tuple[float, float, float]:
    """(MAE, RMSE, WIS) of one of the benchmark's rows."""
    rmse, wis = (float(re.findall(rf"{name} ([^,]+)", row["note"])[0]) for name in ("RMSE", "WIS"))
    return float(row["value"]), rmse, wis


def backtest(found: dict[str, Any]) -> str:
    """Of each time a table: models by horizons, MAE · RMSE · WIS; the least of each in bold."""
    rows = {row["name"]: row for row in found["rows"]}
    lines = list[str]()
    for span in ("2020", "2022"):
        begin = f"{span}, 14 d, "
        models = [name.removeprefix(begin) for name in rows if name.startswith(begin) and " at " not in name]
        horizons = [days for days in (1, 3, 7, 14) if f"{span}, {days} d, persistence" in rows]
        lines += [
            f"| {span} | {' | '.join(f'{days} d' for days in horizons)} |",
            "|---" + "|---:" * len(horizons) + "|",
        ]
        scores = {
            (days, model): told_of(rows[f"{span}, {days} d, {model}"]) for days in horizons for model in models
        }  # fmt: skip
        best = {days: [min(scores[days, model][i] for model in models) for i in range(3)] for days in horizons}
        for model in models:
            cells = []
            for days in horizons:
                told = zip(scores[days, model], best[days], strict=True)
                cells.append(" · ".join(f"**{number(x)}**" if x == least else number(x) for x, least in told))
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epidemic_document")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("backtest").add_argument("json", type=Path, help="what the benchmark wrote")
    drawing = commands.add_parser("picture")
    drawing.add_argument("json", type=Path, help="result.json of a day")
    drawing.add_argument("svg", type=Path)
    given = parser.parse_args()
    found = json.loads(given.json.read_text(encoding="utf-8"))
    if given.command == "backtest":
        print(backtest(found))
    else:
        given.svg.write_text(picture(found), encoding="utf-8")


if __name__ == "__main__":
    main()
