"""Who is who: spellings of one id, and ids that only look alike."""

from __future__ import annotations

import unicodedata

import pytest

from meddiff_steps.cohort.identity import alike, identity_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sub-A01", "sub-a01"),
        ("sub-01", "sub-001"),
        ("P007", "P7"),
        ("7", "7.0"),
        ("7", "7."),
        ("1000", "1e3"),
        ("1000", "1,000"),
        ("100000", "1E+05"),
        ("1.10", "1.1"),  # a spreadsheet makes the one of the other
        ("sub-7", "7"),
        ("P 7", "P\u00a07"),
        ("P7", "P7\u200b"),
        ("P-7", "P\u20137"),
        ("P7", "\uff30\uff17"),  # full width
        ("7", "\u0667"),  # Arabic-Indic
        (unicodedata.normalize("NFC", "Jos\u00e9"), unicodedata.normalize("NFD", "Jos\u00e9")),
        ("stra\u00dfe", "STRASSE"),
    ],
)
def test_spellings_of_one_id(one: str, other: str) -> None:
    assert identity_key(one) == identity_key(other)
    assert alike([one, other, "another"]) == [sorted((one, other))]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sub-1", "sub-10"),
        ("1.05", "1.5"),
        ("site1.05b", "site1.5b"),
        ("A1", "A1b"),
        ("A-1", "A1"),
        ("100", "10"),
        ("0", "00a"),
        ("1" * 40, "1" * 39 + "2"),  # more digits than a float or a decimal of Python's default precision
    ],
)
def test_different_ids(one: str, other: str) -> None:
    assert alike([one, other]) == []
