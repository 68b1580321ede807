"""A plan may not ask for what somebody's report says."""

from __future__ import annotations

import pandas as pd
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.privacy.planned_texts import check_texts

COMMON = "No pleural effusion or pneumothorax is seen today."
OWN = "Postman of seventy years who fell off his bicycle near the old harbour, effusion."
SCANS = pd.DataFrame(
    {
        "subject_id": [f"s{i}" for i in range(6)],
        "split": ["train"] * 5 + ["test"],
        "text": [f"{COMMON} Effusion."] * 4 + ["Smith, effusion", f"{COMMON} {OWN}"],
    }
)


def check(text: str | None, own_words: bool = True) -> None:
    plan = pd.DataFrame({"sample_id": ["syn000000"], "group": "syn", "text": [text]})
    check_texts(plan, SCANS, shared=6, min_subjects=3, own_words=own_words)


@pytest.mark.parametrize("text", [None, "Effusion.", COMMON, f"{COMMON} Effusion.", "Pleural effusion or pneumothorax"])
def test_own_words_and_phrases_of_many_may_be_used(text):
    check(text)


@pytest.mark.parametrize(
    "text", [OWN, "effusion; he FELL off his bicycle near the wall", "Smith, effusion", "smith effusion."]
)
def test_reports_are_refused_and_not_shown(text):
    with pytest.raises(UserError, match=r"plan.syn, subject syn000000: its text has a run of words") as error:
        check(text)
    assert "bicycle" not in str(error.value) and "s5" not in str(error.value)


def test_a_text_without_a_known_word_is_refused_unless_an_encoder_knows_more():
    with pytest.raises(UserError, match="knows no word of 'Cardiomegaly.'"):
        check("Cardiomegaly.")
    check("Cardiomegaly.", own_words=False)
