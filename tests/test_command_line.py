import subprocess
import sys

import pytest

from meddiff_steps import __version__
from meddiff_steps.__main__ import STEPS
from meddiff_steps.config import STAGES
from meddiff_steps.core.code_digest import code_digest, imports_of


def meddiff(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meddiff_steps", *arguments], capture_output=True, text=True)


def test_without_arguments_all_steps_are_listed():
    done = meddiff()
    assert done.returncode == 0
    assert all(name in done.stdout for name in STEPS)
    assert meddiff("--version").stdout.strip() == __version__


@pytest.mark.parametrize("step", ["freeze", "cohort", "diffusion", "report"])
def test_every_step_explains_itself(step):
    done = meddiff(step, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m meddiff_steps {step}" in done.stdout


def test_an_unknown_step_is_refused():
    done = meddiff("tarin")
    assert done.returncode == 2
    assert "there is no step 'tarin'" in done.stderr


def test_a_user_error_is_one_message_without_a_traceback(tmp_path):
    done = meddiff("plan", "--config", str(tmp_path / "none.json"), "--manifest", "m", "--out", "o")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_a_step(stage):
    assert stage in STEPS


def test_the_code_digest_covers_what_a_step_imports():
    assert "meddiff_steps.diffusion.samplers" in imports_of("meddiff_steps.synthesis.generate")
    assert len({code_digest(step) for step in STAGES}) == len(STAGES)
