"""Whose denoising losses are attacked."""

import numpy as np
import pandas as pd

from meddiff_steps.privacy.assessment import LOSS_SCANS
from meddiff_steps.steps.privacy import _some_people


def test_people_of_all_sites_are_attacked_with_one_scan_each():
    """Scans lie in the order of their ids, which may begin with a site."""
    ids = [f"{site}{number:04d}" for site in "ABCDE" for number in range(100) for _ in range(2)]
    scans = pd.DataFrame({"subject_id": ids})
    rows = _some_people(scans, np.arange(len(ids)))
    chosen = scans["subject_id"].iloc[rows]
    assert len(rows) == chosen.nunique() == LOSS_SCANS
    assert chosen.str[0].value_counts().reindex(list("ABCDE")).min() > 8
    assert list(_some_people(scans, rows[:5])) == list(rows[:5])
