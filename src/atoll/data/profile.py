"""Drafts a schema from a table: ``atoll profile``.

It runs at the site, and the draft stays there until the operator shares it. Single people's cells do not show
in it: ranges are the data's, widened to steps of 1, 2 or 5; codes are written only if at least RARE rows have
them; counts below RARE are not told. The table keeps the drafted contract.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import ibis
import ibis.expr.types as ir
import yaml

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.frame import ROW

RARE = 5
MAX_CODES = 50
MAX_NUMERIC_CODES = 20
MISSING_WORDS = ("na", "n/a", "nan", "null", "none", "nil", "?", "-", "--", ".", "unknown", "missing", "inf", "-inf",
                 "无", "不详", "未知", "缺失", "空")  # fmt: skip
MISSING_NUMBERS = (-9999, -999, -99, -9, -1, 0, 9, 99, 999, 9999, 99999)
DATE_FORMATS = ("%Y/%m/%d", "%Y.%m.%d", "%Y%m%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y年%m月%d日",
                "%d %b %Y", "%Y/%m/%d %H:%M", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%Y%m%d%H%M%S")  # fmt: skip
_IDENTIFIER = re.compile(r"(?i:^|_)(?i:id|uuid|guid|key)$|^(?i:id)(?:_|$)|(?<=[a-z])(?:Id|ID)$|编号|身份证|病历号")
_LABEL = {"y", "label", "target", "outcome", "class"}
_GRAINS = (("1h", 3600), ("15min", 900), ("1min", 60))


@dataclass
class _Draft:
    column: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def draft(cells: ir.Table, engine: Engine, name: str) -> str:
    """The draft as YAML text. cells: as :func:`atoll.data.sources.open_cells` delivers them. Raises SchemaError."""
    names = [column for column in cells.columns if column != ROW]
    plain = cells.select(*names)
    rows = int(engine.row(plain.aggregate(n=plain.count()))["n"])
    if rows == 0:
        raise SchemaError("source.empty", "the table has no rows", field="path", remedy="check the site's source")
    if rows < RARE:
        raise SchemaError(
            "profile.too-few-rows", f"a table of fewer than {RARE} rows would show single cells in its draft",
            field="path", remedy="write the schema by hand",
        )  # fmt: skip
    distinct = plain.distinct()
    repeated = rows - int(engine.row(distinct.aggregate(n=distinct.count()))["n"])
    drafts = {column: _column(column, plain.select(cell=plain[column]), rows, engine) for column in names}
    times = [column for column, made in drafts.items() if made.column.get("role") == "time"]
    for column in times[1:]:
        del drafts[column].column["role"]
    lines = [
        "# Drafted by atoll profile from one site's table: it is that site's to share. Look it over first: fill in",
        "# units, widen ranges to what is plausible (other sites must fit too), check roles and code lists.",
        f"# {_count(repeated, rows)} repeat another row in every cell." if repeated else "# No row repeats another.",
        *_entry({"name": name}), *_entry({"max_rows": int(_outwards(0, 2 * rows)[1])}), "columns:",
    ]  # fmt: skip
    for column, made in drafts.items():
        lines += [f"  # {note}" for note in made.notes]
        lines += [f"  {line}" for line in _entry({column: made.column})]
    text = "\n".join(lines) + "\n"
    TableSchema.model_validate(yaml.safe_load(text))
    return text


def _entry(content: Mapping[str, Any]) -> list[str]:
    """One line of YAML."""
    text = yaml.safe_dump(dict(content), default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf)
    return [text.strip()[1:-1]]


def _count(number: int, rows: int) -> str:
    return f"{number} of {rows} rows" if number >= RARE else f"Fewer than {RARE} rows"


def _column(name: str, one: ir.Table, rows: int, engine: Engine) -> _Draft:
    """What one column (called "cell") is. Text is looked at as what it may be cast to, as the check will."""
    kind = one["cell"].type()
    if not (kind.is_string() or kind.is_numeric() or kind.is_date() or kind.is_timestamp()):
        return _Draft({"dtype": "text", "role": "ignore"}, ["The contract knows no such type."])
    words = _words(one, engine) if kind.is_string() else []
    known = one.filter(one["cell"].notnull() & one["cell"].notin(words)) if words else one.filter(one["cell"].notnull())
    found = engine.row(known.aggregate(**_looks(known["cell"])))
    notes: list[str] = []
    if found["there"] and not _typed(found):  # in text, such a word may be a code like any other
        notes += [f"Does {' or '.join(map(repr, words))} mean missing? Then add null_values."] if words else []
        known, words = one.filter(one["cell"].notnull()), []
        found = engine.row(known.aggregate(**_looks(known["cell"])))
    there = int(found["there"])
    missing = rows - there
    if words:
        notes.append(f"Taken to mean missing: {', '.join(words)}.")
    if missing >= RARE:
        notes.append(f"{missing / rows:.2g} of the cells are missing.")
    if there == 0:
        return _Draft({"dtype": "text", "role": "ignore"}, ["Every cell is missing."])
    column: dict[str, Any]
    timely = found["times"] == there and not found["numbers"]
    unique = found["about"] > 0.5 * there and _distinct(known, engine) == rows
    if _IDENTIFIER.search(name) and not timely:
        if unique:
            return _Draft({"dtype": "text", "role": "entity"}, ["Named like an id, and every row has its own."])
        notes.append("Named like an id, but not every row has its own: an entity needs that.")
        column = {"dtype": "text"}
    elif found["numbers"] == there:
        column = _numeric(known, found, notes, engine)
    elif timely:
        column = _times(known, found, engine)
    else:
        column = _text(known, found, unique, notes, engine)
    if name.lower() in _LABEL and "role" not in column:
        column["role"] = "label"
    if words:
        column["null_values"] = words
    if missing == 0:
        column["missing"] = "forbid"
    return _Draft(column, notes)


def _typed(found: Mapping[str, Any]) -> bool:
    """Are all cells numbers, or all dates?"""
    return found["there"] in (found["numbers"], found["times"])


def _distinct(one: ir.Table, engine: Engine) -> int:
    return int(engine.row(one.aggregate(n=one["cell"].nunique()))["n"])


def _words(one: ir.Table, engine: Engine) -> list[str]:
    """The usual words for missing, as the column spells them."""
    cell = one["cell"]
    spelled = one.filter(cell.lower().isin(MISSING_WORDS)).distinct().order_by("cell")
    return [str(word) for batch in engine.batches(spelled) for word in batch.column("cell").to_pylist()]


def _looks(cell: Any) -> dict[str, Any]:
    """Counts of what the cells can be read as."""
    kind = cell.type()
    timed = kind.is_date() or kind.is_timestamp()
    nothing = cell.nullif(cell).cast("string")
    number = (nothing if timed else cell).try_cast("float64")
    when = (nothing if kind.is_numeric() else cell).try_cast("timestamp(6)")
    finite = ~(number.isnan() | number.isinf())
    looks = {
        "there": cell.count(), "about": cell.approx_nunique(), "numbers": finite.sum().coalesce(0),
        "whole": (finite & (number == number.floor()) & (number.abs() <= 2**53)).sum(),
        "low": number.min(), "high": number.max(),
        "times": when.count(), "latest": when.max(), "clock": (when.epoch_seconds() % 86_400 != 0).sum(),
    }  # fmt: skip
    if kind.is_string():
        looks["thousands"] = cell.re_search(r"^-?\d{1,3}(,\d{3})+(\.\d+)?$").sum()
        looks["plain"] = cell.replace(",", "").try_cast("float64").count()
        looks["padded"] = cell.re_search(r"^0\d").sum()
    return looks


def _times(one: ir.Table, found: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """Dates, or dates with times; the role time, unless they are still to come (the check refuses those)."""
    soon = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    column = {"role": "time"} if found["latest"] <= soon else {}
    if not found["clock"]:
        return {"dtype": "date", **column}
    seconds = one["cell"].try_cast("timestamp(6)").epoch_seconds()
    odd = engine.row(one.aggregate(**{grain: (seconds % step != 0).sum() for grain, step in _GRAINS}))
    grain = next((grain for grain, _ in _GRAINS if not odd[grain]), None)
    return {"dtype": "datetime", **column, **({"grain": grain} if grain else {})}


def _numeric(one: ir.Table, found: Mapping[str, Any], notes: list[str], engine: Engine) -> dict[str, Any]:
    whole, low, high = found["whole"] == found["numbers"], float(found["low"]), float(found["high"])
    if found.get("padded"):
        notes.append("Some of its numbers begin with 0: codes rather than amounts? Then dtype: text.")
    if (
        whole
        and low >= 1900_01_01
        and high < 2101_01_01
        and found.get("padded") == 0
        and _formats(one, there=int(found["there"]), engine=engine)
    ):
        notes.append("Dates written as numbers, %Y%m%d? Then parse them in the recipe, and dtype: date.")
    number = one["cell"].try_cast("float64")
    if whole and found["about"] <= 2 * MAX_NUMERIC_CODES:
        counts = _codes(one.select(cell=number), engine)
        if len(counts) <= MAX_NUMERIC_CODES and min(counts.values()) >= RARE:
            codes = sorted(int(code) for code in counts)
            _suspect_codes(codes, notes)
            return {"dtype": "integer", "values": codes}
    for code in {low, high} & set(map(float, MISSING_NUMBERS)):
        others = number.nullif(code)
        rest = engine.row(one.aggregate(n=others.count(), low=others.min(), high=others.max()))
        count = found["numbers"] - rest["n"]
        if rest["n"] and count >= RARE:
            gap = rest["low"] - code if code == low else code - rest["high"]
            if gap > max(0.1 * (rest["high"] - rest["low"]), 2):
                within = _outwards(rest["low"], rest["high"], whole=whole)
                notes.append(f"{code:g} stands far from the others: does it mean missing? Then null_values: [{code:g}]")
                notes.append(f"  and range: [{within[0]:g}, {within[1]:g}].")
    if low == high:
        notes.append("Every cell is the same.")
    lowest, highest = _outwards(low, high, whole=whole)
    return {"dtype": "integer" if whole else "real", "unit": "", "range": [lowest, highest]}


def _suspect_codes(codes: list[int], notes: list[str]) -> None:
    far = [codes[0]] if codes[0] < 0 <= codes[-1] else []
    far += [codes[-1]] if len(codes) > 1 and codes[-1] > 2 * max(codes[-2], 1) else []
    odd = [code for code in far if code in MISSING_NUMBERS]
    if odd:
        notes.append(f"Does {' or '.join(map(str, odd))} mean missing? Then move it from values to null_values.")
    if len(codes) == 1:
        notes.append("Every cell is the same.")


def _codes(one: ir.Table, engine: Engine) -> dict[Any, int]:
    """Rows by code."""
    there = one.filter(one["cell"].notnull())
    counted = there.group_by("cell").aggregate(n=there.count())
    return {row["cell"]: row["n"] for batch in engine.batches(counted) for row in batch.to_pylist()}


def _text(one: ir.Table, found: Mapping[str, Any], unique: bool, notes: list[str], engine: Engine) -> dict[str, Any]:
    there = int(found["there"])
    if found["thousands"] and found["plain"] == there:
        notes.append("Numbers with thousands separators: clean them in the recipe, then dtype: real and a range.")
    elif formats := _formats(one, there, engine):
        notes.append(f"Dates written as {' and '.join(formats)}: parse them in the recipe, then dtype: date.")
    elif 2 * found["numbers"] > there:
        notes.append("Mostly numbers, but not all: clean the others in the recipe, then dtype: real and a range.")
    elif unique or (found["about"] > 0.5 * there and there > MAX_CODES):
        notes.append("Nearly every cell is different: an identifier or free text. Used only if a study needs it.")
        return {"dtype": "text", "role": "ignore"}
    if found["about"] > 2 * MAX_CODES:
        return {"dtype": "text"}
    counts = _codes(one, engine)
    codes = sorted(code for code, number in counts.items() if number >= RARE)
    if len(counts) > MAX_CODES or not codes:
        return {"dtype": "text"}
    if len(codes) < len(counts):
        notes.append(f"Codes of fewer than {RARE} rows are not told; the others: {', '.join(map(_shown, codes))}.")
        return {"dtype": "text"}
    return {"dtype": "text", "values": codes}


def _shown(code: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in code)


def _formats(one: ir.Table, there: int, engine: Engine) -> list[str]:
    """The fewest date formats that together read (nearly) all cells."""
    few = engine.row(_read_as(one.limit(1000), DATE_FORMATS))
    likely = [form for form in DATE_FORMATS if few[form]]
    counts = engine.row(_read_as(one, likely)) if likely else {}
    chosen: list[str] = []
    rest, left = one, there
    counts.pop("left", None)
    while left > 0.05 * there and any(counts.values()):
        best = max(counts, key=lambda form: counts[form])
        chosen.append(best)
        rest = rest.filter(_parsed(rest["cell"], best).isnull() & rest["cell"].notnull())
        counts = engine.row(_read_as(rest, likely))
        left = int(counts.pop("left"))
    return chosen if left <= 0.05 * there else []


def _read_as(one: ir.Table, forms: Sequence[str]) -> Any:
    return one.aggregate(left=one.count(), **{form: _parsed(one["cell"], form).count() for form in forms})


def _strptime(cell: str, form: str) -> datetime:
    raise NotImplementedError  # the engine's own


_parsed: Any = ibis.udf.scalar.builtin(_strptime, name="try_strptime")


def _outwards(low: float, high: float, *, whole: bool = True) -> tuple[float, float]:
    """[low, high] with a twentieth of headroom, rounded outwards to a tenth's step of 1, 2 or 5; never across 0."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 10
    power = math.floor(math.log10(rough))
    step = next(s for s in (1, 2, 5, 10) if s * 10.0**power >= rough * (1 - 1e-12))
    if whole and power < 0:
        step, power = 1, 0
    unit = step * 10.0**power

    def rounded(value: float, how: Any) -> float:
        number = round(how(value / unit) * unit, max(0, -power))
        return int(number) if power >= 0 and abs(number) < 2**53 else float(number)

    lowest, highest = rounded(low - span / 20, math.floor), rounded(high + span / 20, math.ceil)
    return (max(lowest, 0) if low >= 0 else lowest), (min(highest, 0) if high <= 0 and low < 0 else highest)
