"""Estimates of what a study will cost."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps.config import Study, load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.operations.cost import Estimate, estimates, forward_flops, wall_hours, work

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> Study:
    return load_study(ROOT / "config/config.yaml")


def test_operations_are_those_of_real_networks(demo):
    autoencoder = Autoencoder(demo.autoencoder, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(torch.rand(2, 1, *demo.preprocess.shape))
    assert 2 * forward_flops(demo)[0] == counter.get_total_flops()


def test_the_published_scale_is_counted_without_its_memory():
    """256, 512 and 768 channels on 20 x 28 x 20 latents: hundreds of GFLOP per pass."""
    study = load_study(ROOT / "config/studies/ukb.yaml")
    stages = work(study, 31_740)
    assert stages["generate"].jobs == 400
    assert 1e11 < forward_flops(study)[2] < 1e13


def test_work_follows_the_plan_and_guidance_doubles_passes(demo):
    twice = demo.model_copy(update={"plan": [demo.plan[0].model_copy(update={"subjects": 400})]})
    assert work(twice, 1000)["generate"].amount == 2 * work(demo, 1000)["generate"].amount
    assert work(twice, 1000)["diffusion"] == work(demo, 1000)["diffusion"]
    alone = demo.model_copy(update={"generate": demo.generate.model_copy(update={"guidance_scale": 1.0})})
    decoder = forward_flops(demo)[1] * 200
    assert work(demo, 1000)["generate"].amount - decoder == pytest.approx(
        2 * (work(alone, 1000)["generate"].amount - decoder)
    )


def test_jobs_that_run_beside_each_other_take_as_long_as_one():
    found = [Estimate("generate", 10, 0.5, True, 0.0), Estimate("privacy", 1, 2.0, False, 0.0)]
    assert wall_hours(found, 1) == 7.0
    assert wall_hours(found, 5) == 3.0
    assert wall_hours(found, 4) == 3.5


def test_a_folder_without_results_is_refused(demo, tmp_path):
    with pytest.raises(UserError, match=r"expected the results of a finished study"):
        list(estimates(demo, 1000, tmp_path))
