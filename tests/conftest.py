"""What tests of several folders need."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def bids_report() -> Callable[[Path], dict[str, Any]]:
    """What the BIDS validator says of a dataset, all rows of its tables read, and its `returncode`."""
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    assert validator, (
        "bids-validator-deno is not installed, though envs/requirements-test.lock has it: run `make test`, or pip"
        " install -r that file"
    )

    def report(folder: Path) -> dict[str, Any]:
        done = subprocess.run(
            [validator, "--max-rows", "-1", "--format", "json", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(done.stdout) | {"returncode": done.returncode}

    return report
