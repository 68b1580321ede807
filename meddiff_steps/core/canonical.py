"""Canonical JSON (RFC 8785): equal values give equal bytes, in this program and in any other that follows the
standard.
"""

from __future__ import annotations

import json
import math
from typing import Any

#: Integers beyond this are not exact in the IEEE 754 doubles that RFC 8785 counts in.
EXACT = 2**53


def canonical_json(value: Any) -> str:
    """JSON by RFC 8785: keys sorted by UTF-16 code units, no spaces, numbers as ECMAScript writes them.

    >>> canonical_json({"b": [1.0, 1e-7], "a": "\\u20ac"})
    '{"a":"€","b":[1,1e-7]}'

    Raises
    ------
    ValueError
        A number is not finite, an integer is beyond 2^53, a key is no text, text holds half a surrogate pair, or a
        value is nothing that JSON knows.
    """
    if _simple(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _encode(value)


def canonical_bytes(value: Any) -> bytes:
    """`canonical_json` in UTF-8: what is hashed and signed."""
    return _utf8(canonical_json(value))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"text with half a surrogate pair cannot be written as JSON: {text[:80]!r}") from None


def _simple(value: Any) -> bool:
    """Whether Python's own encoder, ten times as fast, writes a value as RFC 8785 asks."""
    kind = type(value)
    if kind is str:
        return bool(value.isascii())
    if kind is dict:
        for (
            key,
            item,
        ) in value.items():  # a loop, and text looked at in place: this is called for every field of every row
            if type(key) is not str or not key.isascii():
                return False
            if not (item.isascii() if type(item) is str else _simple(item)):
                return False
        return True
    if kind is float:
        return 1e-4 <= abs(value) < EXACT and value % 1 != 0
    if kind is int:
        return bool(-EXACT <= value <= EXACT)
    return value is None or kind is bool or (kind in (list, tuple) and all(map(_simple, value)))


def _encode(value: Any) -> str:
    kind = type(value)
    if value is None or kind is bool:
        return json.dumps(value)
    if kind is str:
        _utf8(value)
        return json.dumps(value, ensure_ascii=False)
    if kind is int:
        if abs(value) > EXACT:
            raise ValueError(f"integer {value} is beyond 2^53 and not exact in JSON; write it as text")
        return str(value)
    if kind is float:
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be written as JSON")
        return number(value)
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise ValueError(f"a key must be text, found {[key for key in value if type(key) is not str][:3]}")
        return "{" + ",".join(f"{_encode(key)}:{_encode(value[key])}" for key in sorted(value, key=_utf16)) + "}"
    if kind in (list, tuple):
        return "[" + ",".join(map(_encode, value)) + "]"
    raise ValueError(f"{kind.__name__} is nothing that JSON knows; convert it first")


def _utf16(text: str) -> bytes:
    _utf8(text)
    return text.encode("utf-16-be")


def number(value: float) -> str:
    """A finite float as ECMAScript's Number.prototype.toString writes it (ECMA-262, Number::toString).

    Both languages choose the shortest digits that read back as the same double; they differ in where an exponent
    begins.

    >>> [number(x) for x in (1e21, 1e20, 1e-6, 1e-7)]
    ['1e+21', '100000000000000000000', '0.000001', '1e-7']
    """
    if value == 0:
        return "0"
    mantissa, _, power = f"{value!r}e".partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = (whole + fraction).lstrip("0")
    # The value is 0.DIGITS times 10^point.
    point = int(power.rstrip("e") or 0) + len(whole) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        text = digits + "0" * (point - len(digits))
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1:+d}"
    return sign + text
