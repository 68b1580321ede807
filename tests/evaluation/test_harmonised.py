"""Figures of harmonisations that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.evaluation import harmonisation


def test_a_scan_whose_anatomy_is_flat_leaves_the_others() -> None:
    rows = pd.DataFrame(
        {"subject_id": list("abcd"), "method": "draw", "correlation": [np.nan, 0.9, 0.9, 0.9], "ssim": 0.8, "moved": 0.1}
    )
    found = harmonisation.anatomy(rows, resamples=50, seed="x")["draw"]
    assert found["correlation"]["value"] == pytest.approx(0.9) and found["correlation"]["n"] == 3
    assert found["ssim"]["n"] == 4
