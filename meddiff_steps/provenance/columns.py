"""Canonical JSON of whole tables, column by column: the bytes that `rfc8785` gives for each row, at a tenth of
the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import rfc8785

#: Integers from here on are not exact in the IEEE 754 doubles that RFC 8785 counts in.
BEYOND = 2**53
#: What JSON escapes, or what Arrow does not order and compare as RFC 8785 asks.
_SPECIAL = r'[\x00-\x1f"\\]|[^\x00-\x7f]'


def canonical_lines(table: pa.Table) -> list[bytes]:
    """Each row of a table as canonical JSON (RFC 8785) in UTF-8, as `rfc8785.dumps` writes it of the row as an
    object.

    Raises
    ------
    ValueError
        A number is not finite, an integer is 2^53 or more, or a column holds something else than text, numbers,
        booleans, and records and lists of such.
    """
    batches = [
        _record([(field.name, batch.column(i)) for i, field in enumerate(table.schema)]) for batch in table.to_batches()
    ]
    return [line for batch in batches for line in batch.cast(pa.binary()).to_pylist()]


def _record(columns: Iterable[tuple[str, pa.Array]]) -> pa.Array:
    pieces: list[Any] = []
    opening = "{"
    for name, column in sorted(columns, key=lambda one: one[0].encode("utf-16-be")):
        pieces += [f"{opening}{rfc8785.dumps(name).decode()}:", _texts(column)]
        opening = ","
    return pc.binary_join_element_wise(*pieces, "}", "")


def _texts(column: pa.Array) -> pa.Array:
    """The values of a column as JSON, text."""
    kind = column.type
    if pa.types.is_struct(kind):
        fields = [(kind.field(i).name, part) for i, part in enumerate(column.flatten())]
        return pc.if_else(column.is_valid(), _record(fields), "null")
    if pa.types.is_string(kind):
        if pc.any(pc.match_substring_regex(column, _SPECIAL)).as_py():
            texts = _by_value(column, lambda values: [json.dumps(value, ensure_ascii=False) for value in values])
        else:
            texts = pc.binary_join_element_wise('"', column, '"', "")
    elif pa.types.is_integer(kind):
        extremes = pc.min_max(column).as_py()
        if extremes["min"] is not None and (extremes["min"] <= -BEYOND or extremes["max"] >= BEYOND):
            raise ValueError(f"an integer of {extremes} is 2^53 or more and not exact in JSON; write it as text")
        texts = column.cast(pa.string())
    elif pa.types.is_float64(kind):
        texts = _by_value(column, _numbers)
    elif pa.types.is_list(kind):
        ends = np.cumsum([0, *pc.fill_null(pc.list_value_length(column), 0).to_pylist()])
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), _texts(column.flatten())), ",")
        texts = pc.if_else(column.is_valid(), pc.binary_join_element_wise("[", joined, "]", ""), None)
    elif pa.types.is_boolean(kind) or pa.types.is_null(kind):
        texts = column.cast(pa.string())
    else:
        raise ValueError(f"a column of {kind} is nothing that a ledger holds")
    return pc.fill_null(texts, "null")


def _by_value(column: pa.Array, write: Any) -> pa.Array:
    """Each distinct value is written once."""
    encoded = column.dictionary_encode()
    return pa.array(write(encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)


def _numbers(values: list[float]) -> list[str]:
    if not np.isfinite(values).all():
        raise ValueError("a number that is not finite cannot be written as JSON")
    # Where Python and ECMAScript write the same, Python is faster.
    return [
        repr(value) if 1e-4 <= abs(value) < BEYOND and value % 1 else rfc8785.dumps(value).decode() for value in values
    ]
