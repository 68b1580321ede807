"""A short version of chaos.py."""

import chaos
import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_disturbed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    assert chaos.main(["--faults", "4", "--seed", "0", "--folder", str(tmp_path / "chaos")]) == 0
