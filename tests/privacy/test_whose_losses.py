"""Whose denoising losses are attacked."""

import pandas as pd

from meddiff_steps.privacy.assessment import LOSS_SCANS, some_people


def test_people_of_all_sites_are_attacked_with_one_scan_each():
    """Scans lie in the order of their ids, which may begin with a site."""
    ids = [f"{site}{number:04d}" for site in "ABCDE" for number in range(100) for _ in range(2)]
    rows = some_people(ids)
    chosen = pd.Series(ids).iloc[rows]
    assert len(rows) == chosen.nunique() == LOSS_SCANS
    assert chosen.str[0].value_counts().reindex(list("ABCDE")).min() > 8
    assert len(some_people(chosen.tolist()[:5])) == 5
