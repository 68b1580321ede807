"""Numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def number(value: Any, digits: int = 3) -> str:
    """A number as people write it: at least `digits` significant ones, thousands separated, no exponents for common
    sizes.
    """
    if value is None:
        return "not defined"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10**digits):
        return f"{int(value):,}"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{places}f}"


def interval(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A figure with its interval, such as "0.942 [0.930, 0.951]".

    All three have as many decimals as the interval's width has a use for: two digits of it, more with more `digits`.
    Where there are too few subjects for an interval, it says so.
    """
    if not figure or figure.get("value") is None:
        return "not defined"
    if "too_few" in figure:
        return f"{number(figure['value'], digits)} (no interval: {figure['too_few']} on one side, too few)"
    if figure.get("low") is None or figure.get("high") is None:
        return number(figure["value"], digits)
    value, low, high = (float(figure[key]) for key in ("value", "low", "high"))
    wide = abs(high - low) or abs(value)
    places = max(0, digits - 2 - math.floor(math.log10(wide * (1 + 1e-9)))) if 1e-6 < wide < 1e7 else None
    texts = [number(end, digits) if places is None else _decimals(end, places) for end in (value, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _decimals(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    return text.removeprefix("-") if not text.strip("-0.,") else text


def p_value(value: float | None) -> str:
    """A p-value, to two digits."""
    return "not defined" if value is None else f"{value:.2g}"


def limit(value: float) -> str:
    """A limit as somebody set it, without digits that nobody meant."""
    return f"{value:g}"


def percent(figure: Mapping[str, Any] | None) -> str:
    """A ratio figure in percent, such as "92 % [90, 95]"; what is not quite 0 or 100 % does not read so: "99.6 %"."""
    if not figure or figure.get("value") is None:
        return "not defined"
    text = f"{_hundredths(figure['value'])} %"
    return (
        text
        if figure.get("low") is None or figure.get("high") is None
        else f"{text} [{_hundredths(figure['low'])}, {_hundredths(figure['high'])}]"
    )


def _hundredths(ratio: float) -> str:
    share = 100 * ratio
    if share in (0, 100) or round(share) not in (0, 100):
        return f"{share:.0f}"
    if round(share, 1) not in (0, 100):
        return f"{share:.1f}"
    return "< 0.1" if 0 < share < 1 else "> 99.9" if 99 < share < 100 else str(round(share))


def counted(count: int, word: str) -> str:
    """A number of things: "1 scan", "1,200 scans"."""
    return f"{number(int(count))} {word}{'' if int(count) == 1 else 's'}"
