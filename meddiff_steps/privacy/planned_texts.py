"""What a plan asks for in words must not be what somebody's report says."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pandas as pd

from meddiff_steps.cohort.texts import COLUMN, common_words, plain_words, words
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)


def check_texts(plan: pd.DataFrame, scans: pd.DataFrame, shared: int, min_subjects: int, own_words: bool) -> None:
    """Refuse planned texts that repeat a report of the cohort, or that the model knows no word of.

    A release names the texts that its images were asked for, so a report among them would be published.  Runs of words
    that many people's reports have ("no pleural effusion or pneumothorax is seen") tell of nobody and may be used, and
    so may a report that is shorter than such a run and has common words alone.

    Parameters
    ----------
    plan
        Columns `sample_id`, `group` and `text`.
    scans
        Rows of the manifest with a text, of every split: columns `subject_id`, `split` and `text`.
    shared
        Words in a row that a planned text may not have from a report.
    min_subjects
        Subjects with the same run of words from which on it tells of nobody.
    own_words
        Whether the model knows the words of the training texts alone (no `text.encoder`).

    Raises
    ------
    UserError
        With the subject of the plan; never with the report.
    """
    asked = plan[plan[COLUMN].notna()].drop_duplicates(COLUMN)
    having: dict[tuple[str, ...], set[str]] = {}
    for text, subject in zip(scans[COLUMN], scans["subject_id"], strict=True):
        for run in set(_runs(text, shared)):
            having.setdefault(run, set()).add(subject)
    common: dict[str, set[str]] = {}
    for text, subject in zip(scans[COLUMN], scans["subject_id"], strict=True):
        for word in plain_words(text):
            common.setdefault(word, set()).add(subject)
    private = {
        run
        for run, who in having.items()
        if len(who) < min_subjects and (len(run) == shared or any(len(common[word]) < min_subjects for word in run))
    }
    training = scans[scans["split"] == "train"]
    known = set(common_words(training[COLUMN].tolist(), training["subject_id"].tolist(), min_subjects))
    for name, group, text in zip(asked["sample_id"], asked["group"], asked[COLUMN], strict=True):
        where = f"plan.{group}, subject {name}"
        if private & set(_runs(text, shared)):
            raise UserError(
                f"{where}: its text has a run of words that stands in the reports of fewer than {min_subjects} people"
                f" (text.shared_words: {shared}), or is such a report. A release would publish it. Write the text in"
                " your own words: the findings that images are to show."
            )
        if own_words and not known & set(words(text)):
            raise UserError(
                f"{where}: the model knows no word of {text!r}. It knows those that the texts of {min_subjects}"
                " training subjects or more have (text.min_subjects). Use such words, or give text.encoder."
            )


def _runs(text: str, length: int) -> Iterator[tuple[str, ...]]:
    """Every run of so many words, or the whole text where it is shorter."""
    said = plain_words(text)
    for start in range(max(1, len(said) - length + 1)):
        yield tuple(said[start : start + length])
