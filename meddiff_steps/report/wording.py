"""Numbers as people write them."""

from __future__ import annotations

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
    """A figure with its interval, such as "0.942 [0.930, 0.951]"."""
    if not figure or figure.get("value") is None:
        return "not defined"
    if figure.get("low") is None or figure.get("high") is None:
        return number(figure["value"], digits)
    return f"{number(figure['value'], digits)} [{number(figure['low'], digits)}, {number(figure['high'], digits)}]"


def percent(figure: Mapping[str, Any] | None) -> str:
    """A ratio figure in percent, such as "92 % [90, 95]"."""
    if not figure or figure.get("value") is None:
        return "not defined"
    text = f"{100 * figure['value']:.0f} %"
    return (
        text
        if figure.get("low") is None or figure.get("high") is None
        else f"{text} [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"
    )
