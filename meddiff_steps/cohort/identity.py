"""Who is who: identifiers that differ in spelling alone are one until the study says that they are not.

Spreadsheets drop leading zeros and write 1.0 for 1, file systems and keyboards change capitals and the Unicode form of
a letter.  One person under two spellings would stand on both sides of a split.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal

#: Column of the manifest with a subject's id as it was written, where several spellings were joined: files may be named
#: by it.
SPELLING = "spelling"

_NUMBER = re.compile(r"\+?\d+(?:,\d{3})*(?:\.\d*)?(?:e\+?\d{1,2})?")
#: Zeros before a digit, but not behind the point of a number.
_LEADING_ZEROS = re.compile(r"(?<!\d)(?<!\d\.)0+(?=\d)")


def identity_key(name: str) -> str:
    """What all spellings of an identifier share: no capitals, leading zeros, number format, Unicode form, kind of dash,
    blanks around, or BIDS prefix.

    >>> {identity_key(name) for name in ("sub-01", "SUB-1", "1", " 1.0", "01", "1e0")}
    {'1'}
    >>> identity_key("Site2_P007"), identity_key("1.10"), identity_key("1.10b")
    ('site2_p7', '1.1', '1.10b')
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    text = "".join(_plain(character) for character in text)
    text = re.sub(r"^(?:sub|ses)-", "", " ".join(text.split()))
    if _NUMBER.fullmatch(text):
        return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", format(Decimal(text.replace(",", "")), "f"))
    return _LEADING_ZEROS.sub("", text)


def _plain(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    return "-" if kind == "Pd" else "" if kind == "Cf" else character  # Cf: what has no width


def shown(name: str) -> str:
    """An identifier for messages; what another Unicode form would look like is spelt out.

    >>> shown("P7"), shown("Ren\u00e9")
    ('P7', "Ren\u00e9 ('Ren\\\\xe9')")
    """
    return name if name.isascii() else f"{name} ({name!a})"


def alike(names: Iterable[str]) -> list[list[str]]:
    """Identifiers that differ in spelling alone, sorted, one list for each that has several spellings.

    >>> alike(["sub-01", "sub-1", "sub-2", "sub-2"])
    [['sub-01', 'sub-1']]
    """
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        spellings[identity_key(name)].add(name)
    return sorted(sorted(found) for found in spellings.values() if len(found) > 1)


def one_spelling(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """The first of its group for each spelling in groups that `alike` found.

    >>> one_spelling([["sub-01", "sub-1"]])
    {'sub-01': 'sub-01', 'sub-1': 'sub-01'}
    """
    return {name: group[0] for group in groups for name in group}
