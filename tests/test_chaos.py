"""A short version of chaos.py; minutes, so it runs only where it is asked for."""

import os

import chaos
import pytest


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif("MEDDIFF_CHAOS" not in os.environ, reason="takes several minutes; set MEDDIFF_CHAOS=1 to run it")
def test_disturbed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    assert chaos.main(["--faults", "4", "--seed", "0", "--folder", str(tmp_path / "chaos")]) == 0
