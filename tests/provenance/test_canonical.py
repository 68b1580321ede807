"""Canonical JSON: the library against the vectors that RFC 8785 publishes, and whole tables against the library."""

from __future__ import annotations

import json
import math
import random
import struct

import pyarrow as pa
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from meddiff_steps.provenance import verify
from meddiff_steps.provenance.columns import BEYOND, canonical_lines


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555554", "333333333.33333325"),
        ("41b3de4355555555", "333333333.3333333"),
        ("41b3de4355555556", "333333333.3333334"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_numbers_of_appendix_b(bits, expected):
    value = struct.unpack(">d", bytes.fromhex(bits))[0]
    assert rfc8785.dumps([value]).decode() == f"[{expected}]"
    assert canonical_lines(pa.table({"x": [value]}))[0].decode() == f'{{"x":{expected}}}'


def test_the_example_of_section_3_2_2():
    value = json.loads(r"""{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}""")
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        r""""string":"€$\u000f\nA'B\"\\\\\"/"}"""
    )
    assert rfc8785.dumps(value).decode() == expected


def test_keys_are_sorted_as_in_section_3_2_3():
    keys = {"\u20ac": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh", "1": "One"}
    keys |= {"\U0001f600": "Emoji: Grinning Face", "\x80": "Control", "\u00f6": "Latin Small Letter O With Diaeresis"}
    order = [
        "Carriage Return",
        "One",
        "Control",
        "Latin Small Letter O With Diaeresis",
        "Euro Sign",
        "Emoji: Grinning Face",
        "Hebrew Letter Dalet With Dagesh",
    ]
    assert list(json.loads(rfc8785.dumps(keys)).values()) == order


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - BEYOND, BEYOND - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=5)
    ),
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_what_is_written_reads_back_and_is_written_the_same_again(value):
    content = rfc8785.dumps(value)
    read = json.loads(content, parse_int=float)  # as every other language reads it
    assert read == value and rfc8785.dumps(read) == content
    assert canonical_lines(pa.table({"x": pa.array([json.dumps(value)])})) == [rfc8785.dumps({"x": json.dumps(value)})]


@given(st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=1))
@settings(max_examples=300, deadline=None)
def test_every_double_is_written_alike_in_tables_and_documents(values):
    lines = canonical_lines(pa.table({"x": pa.array(values, pa.float64())}))
    assert lines == [rfc8785.dumps({"x": value}) for value in values]
    assert [json.loads(line, parse_int=float)["x"] for line in lines] == values


@pytest.mark.parametrize("value", [BEYOND, -BEYOND, 2**63, math.nan, math.inf])
def test_numbers_that_json_cannot_say_are_refused_by_all_who_write_or_read_them(value):
    with pytest.raises(ValueError):
        rfc8785.dumps(value)
    with pytest.raises((ValueError, OverflowError)):
        canonical_lines(pa.table({"x": pa.array([value])}))
    with pytest.raises(ValueError):
        verify.load_json(json.dumps(value).encode())


def test_order_and_type_of_a_container_do_not_matter():
    assert (
        rfc8785.dumps({"b": (1, 2.0), "a": None})
        == rfc8785.dumps({"a": None, "b": [1.0, 2]})
        == b'{"a":null,"b":[1,2]}'
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {"a": {1}}, "\ud800", {"\ud800": 1}, b"x"])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError):
        rfc8785.dumps([value])


# ------------------------------------------------------------------------------------------- whole tables

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("number", pa.float64()),
        ("whole", pa.int64()),
        ("\ufb33", pa.string()),
        ("\U0001f9e0", pa.int64()),
        ("part", pa.struct([("z", pa.float64()), ("a", pa.string()), ("é", pa.bool_()), ("l", pa.list_(pa.string()))])),
        ("list", pa.list_(pa.float64())),
        ("nothing", pa.null()),
    ]
)


def drawn_row(draw: random.Random) -> dict:
    def text():
        return draw.choice([None, "", "plain", 'a "b" \\', "line\nand\x00\x1f\x7f", "Köln \U0001f9e0", "\u2028"])

    def number():
        floats = [0.0, -0.0, 40.0, 1e21, 1e-7, 5e-324, -1.5e300, 2.0**53, draw.random(), draw.gauss(0, 1e-5)]
        return draw.choice([None, *floats])

    def whole():
        return draw.choice([None, 0, 1 - BEYOND, BEYOND - 1, draw.randrange(-1000, 1000)])

    def many(one):
        return draw.choice([None, [], [one()], [one(), one(), one()]])

    part = {"z": number(), "a": text(), "é": draw.choice([None, True, False]), "l": many(text)}
    return {
        "text": text(),
        "number": number(),
        "whole": whole(),
        "\ufb33": text(),
        "\U0001f9e0": whole(),
        "part": draw.choice([None, part]),
        "list": many(number),
        "nothing": None,
    }


def test_columns_are_written_as_rows_are():
    draw = random.Random(7)
    for count in (0, 1, 2, 3, 500):
        rows = [drawn_row(draw) for _ in range(count)]
        assert canonical_lines(pa.Table.from_pylist(rows, schema=SCHEMA)) == [rfc8785.dumps(row) for row in rows]


def test_what_rows_refuse_columns_refuse():
    for column in (pa.array([1.0, float("nan")]), pa.array([float("inf")]), pa.array([BEYOND]), pa.array([b""])):
        with pytest.raises(ValueError):
            canonical_lines(pa.table({"x": column}))
