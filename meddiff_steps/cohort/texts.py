"""Texts that belong to scans: their words, which of these are negated, and what a text says of a finding."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import pandas as pd

from meddiff_steps.cohort.covariates import cell_text, is_null
from meddiff_steps.core.errors import UserError

#: The column of the manifest and of the plan that holds texts.
COLUMN = "text"
#: Words that negate what follows in their clause (after Chapman et al. 2001, who look behind them, too).
NEGATIONS = frozenset("no not without denies denied neither nor negative absent".split())
#: Where a negation ends: at the end of a sentence, and at what turns it.
_CLAUSE = re.compile(r"[.;:!?()\n]|\b(?:but|however|although|except|with)\b")
_WORD = re.compile(r"[^\W_]+")
#: In front of a negated word.
NEGATED = "no:"


def clean_text(cell: object) -> str | None:
    """The text of a cell on one line, in Unicode form NFC; None where it is missing or has no word."""
    text = " ".join(unicodedata.normalize("NFC", cell_text(cell)).split())
    text = "".join(character for character in text if character.isprintable())
    return None if is_null(text) or not _WORD.search(text) else text


def read_texts(frame: pd.DataFrame, column: str) -> list[str | None]:
    """The texts of a cohort, cleaned.

    Raises
    ------
    UserError
        No scan has one.
    """
    texts = [clean_text(cell) for cell in frame[COLUMN]]
    if not any(texts):
        raise UserError(
            f"text.column: {column!r} is empty for all {len(texts)} scans, so nothing can be learnt from it. Name the"
            " column that holds the texts, or leave text.column out."
        )
    return texts


def without_text(subjects: pd.DataFrame) -> pd.DataFrame:
    """Subjects as their covariates alone say: a scan's own report tells what its covariates are not to tell."""
    return subjects.drop(columns=COLUMN, errors="ignore")


def text_digest(text: str) -> str:
    """What a text is known by where it must not be shown: SHA-256 of it in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def words(text: str) -> list[str]:
    """Words in lower case, those that are negated with `no:` in front.

    >>> words("No pleural effusion or pneumothorax, but consolidation.")
    ['no', 'no:pleural', 'no:effusion', 'no:or', 'no:pneumothorax', 'consolidation']
    """
    found = []
    for clause in _CLAUSE.split(unicodedata.normalize("NFKC", text).lower()):
        negated = False
        for word in _WORD.findall(clause):
            found.append(f"{NEGATED}{word}" if negated and word not in NEGATIONS else word)
            negated = negated or word in NEGATIONS
    return found


def plain_words(text: str) -> list[str]:
    """Words in lower case, as they stand."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def mentions(text: str, phrases: Iterable[str]) -> bool:
    """Whether a text names one of several phrases without negating it; `*` at the end of a word stands for any end.

    >>> mentions("Small consolidations. No effusion.", ["consolidat*"]), mentions("No effusion.", ["effusion"])
    (True, False)
    """
    said = words(text)
    return any(_holds(said, phrase.lower().split()) for phrase in phrases)


def _holds(said: Sequence[str], phrase: Sequence[str]) -> bool:
    def same(word: str, wanted: str) -> bool:
        return word.startswith(wanted[:-1]) if wanted.endswith("*") else word == wanted

    starts = range(len(said) - len(phrase) + 1)
    return any(all(same(said[start + i], wanted) for i, wanted in enumerate(phrase)) for start in starts)


def common_words(texts: Sequence[str], subjects: Sequence[str], least: int) -> list[str]:
    """Words that the texts of at least so many subjects have, the most common first, then by letters."""
    having: dict[str, set[str]] = {}
    for text, subject in zip(texts, subjects, strict=True):
        for word in words(text):
            having.setdefault(word, set()).add(subject)
    kept = [word for word, who in having.items() if len(who) >= least]
    return sorted(kept, key=lambda word: (-len(having[word]), word))


def text_columns(column: str | None, available: Sequence[str], origin: str) -> dict[str, str]:
    """The source column of texts under the name that the manifest gives it; nothing where the study has no texts.

    Raises
    ------
    UserError
        The column is not there.
    """
    if column is None:
        return {}
    if column not in available:
        raise UserError(
            f"{origin}: text.column reads column {column!r}, which is not there. Columns are: {', '.join(available)}."
            " Set text.column to the right one, or leave it out."
        )
    return {COLUMN: column}
