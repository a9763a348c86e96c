"""Numbers, sizes, durations and lists as people read them. What is missing is an en dash."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Sequence
from numbers import Real

NOTHING = "–"
WITHHELD = "withheld"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def real(value: object) -> float | None:
    """*value* as a finite float; None for NaN, infinities and whatever is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def fixed(value: object, places: int = 3) -> str:
    """With so many decimal places: 0.871."""
    number = real(value)
    if number is None:
        return NOTHING
    return f"{number:,.{places}f}".replace("-", "−") if abs(number) < 1e9 else significant(number)


def significant(value: object, digits: int = 4) -> str:
    """With so many significant digits, and all of an integer's: 12,345, 14.13 and 0.001234."""
    number = real(value)
    if number is None:
        return NOTHING
    if number == round(number) and abs(number) < 1e9:
        return whole(number)
    exponent = math.floor(math.log10(abs(number)))
    if not -5 <= exponent < 9:
        mantissa, _, power = f"{number:.{max(digits - 2, 0)}e}".partition("e")
        return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")
    return f"{number:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")


def whole(value: object) -> str:
    """An integer with thousands separated: 12,345."""
    number = real(value)
    return NOTHING if number is None else f"{number:,.0f}".replace("-", "−")


def told(value: object, form: Callable[[object], str] = whole) -> str:
    """*value* in words, where a value that is not there was withheld."""
    return WITHHELD if real(value) is None else form(value)


def compact(value: object) -> str:
    """In few characters: 43k, 1.2M, 0.05."""
    number = real(value)
    if number is None:
        return NOTHING
    size, letter = next(((s, c) for s, c in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if abs(number) >= s), (1.0, ""))
    scaled = number / (1e3 if letter == "k" else size)
    return f"{scaled:.{3 if letter else 4}g}".replace("-", "−").replace("e", " × 10^") + letter


def percent(part: object, total: object) -> str:
    """*part* of *total*: 3.4 %."""
    p, t = real(part), real(total)
    return NOTHING if p is None or not t else f"{100 * p / t:.1f} %"


def p_value(value: object) -> str:
    """A p-value to three places; smaller ones as "< 0.001"."""
    number = real(value)
    return "< 0.001" if number is not None and number < 0.001 else fixed(number)


def size(size_bytes: object) -> str:
    """Bytes in decimal units: 161.9 kB."""
    number = real(size_bytes)
    if number is None:
        return NOTHING
    power = 0 if number < 999.5 else min(int(math.log10(number) / 3 + 1e-4), 4)
    return f"{number / 1000**power:,.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: object) -> str:
    """12 ms, 0.20 s, 42 s, 3 min 20 s or 2 h 5 min."""
    number = real(seconds)
    if number is None:
        return NOTHING
    if number < 0.1:
        return f"{1000 * number:.0f} ms"
    if number < 59.5:
        return f"{number:.2f} s" if number < 1 else f"{number:.1f} s" if number < 9.95 else f"{number:.0f} s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(text: object) -> str:
    """An ISO time as "2025-03-12 14:05 UTC"; what is no ISO time stays as it is."""
    try:
        time = dt.datetime.fromisoformat(str(text))
    except ValueError:
        return str(text)
    return f"{time:%Y-%m-%d %H:%M}" + (f" {time.tzname()}" if time.tzinfo else "")


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 site", "4 sites"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[object], most: int = 6) -> str:
    """ "a, b and c"; beyond *most* names "a, b and 12 more"."""
    shown = [str(name) for name in names]
    if len(shown) > most:
        shown = [*shown[: most - 1], f"{len(shown) - most + 1:,} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else NOTHING
