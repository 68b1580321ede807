import subprocess
import sys

import pytest

from meddiff_steps import __version__
from meddiff_steps.__main__ import STEPS
from meddiff_steps.config import STAGES
from meddiff_steps.core.code_digest import code_digest, reached


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


def test_the_code_digest_covers_what_a_step_runs():
    assert "meddiff_steps.diffusion.sampling:sample" in reached("generate")
    assert len({code_digest(step) for step in STAGES}) == len(STAGES)


@pytest.mark.parametrize(
    ("step", "key", "variant", "other"),
    [
        ("generate", "generate.sampler", "diffusion.samplers.dpmpp", "diffusion.samplers.heun"),
        ("privacy", "privacy.detectors", "privacy.detectors.aligned", "privacy.detectors.latent"),
        ("evaluate", "evaluate.metrics", "evaluation.realism.classifier_auc", "evaluation.realism.kid"),
        ("evaluate", "evaluate.spaces", "instruments.feature_spaces.radiomics", "instruments.feature_spaces.structure"),
    ],
)
def test_the_code_digest_covers_the_variants_that_a_study_chooses(step, key, variant, other):
    (section, name), chosen = key.split("."), variant.rpartition(".")[2]

    def modules(step, choice):
        return {item.partition(":")[0] for item in reached(step, {section: {name: choice}})}

    many = name != "sampler"
    found = modules(step, [chosen] if many else chosen)
    assert f"meddiff_steps.{variant}" in found and f"meddiff_steps.{other}" not in found
    if many:  # all of them, where a study leaves it open
        assert {f"meddiff_steps.{variant}", f"meddiff_steps.{other}"} <= modules(step, None)
    assert f"meddiff_steps.{variant}" not in modules("scale", [chosen] if many else chosen)
