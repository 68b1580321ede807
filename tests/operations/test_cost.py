"""Estimates of what a study will cost."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps import config
from meddiff_steps.config import Study, load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.operations.cost import Estimate, estimates, forward_flops, passes_per_sample, wall_hours, work

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> Study:
    return load_study(ROOT / "config/config.yaml")


def test_operations_are_those_of_real_networks(demo):
    autoencoder = build_first_stage(demo.autoencoder, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(torch.rand(2, 1, *demo.preprocess.shape))
    assert 2 * forward_flops(demo)[0] == counter.get_total_flops()
    decoder, steps = build_decoder(demo.decoder, (1, *demo.preprocess.shape)), 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.draw(*torch.rand(2, 1, 1, *demo.preprocess.shape), steps)
    # Beside the network, the stems are counted.
    assert steps * forward_flops(demo)[3] == pytest.approx(counter.get_total_flops(), rel=0.01)


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
    one, two = (
        demo.model_copy(update={"generate": demo.generate.model_copy(update={"guidance_scale": scale})})
        for scale in (1.0, 2.0)
    )
    _, decoder, _, drawing = forward_flops(demo)
    images = (decoder + demo.generate.drawing_steps * drawing) * 200
    assert work(two, 1000)["generate"].amount - images == pytest.approx(
        2 * (work(one, 1000)["generate"].amount - images)
    )


def test_guidance_costs_where_it_acts_and_latents_at_half_the_resolution_an_eighth(demo):
    def passes(**changes):
        generate = demo.generate.model_copy(update={"guidance_scale": 2.0, **changes})
        return passes_per_sample(demo.model_copy(update={"generate": generate}))

    steps = demo.generate.num_inference_steps
    assert (passes(guidance_scale=1.0), passes(), passes(guidance_interval=(1e8, 1e9))) == (steps, 2 * steps, steps)
    assert steps < passes(guidance_interval=(0.3, 3.0)) < 2 * steps
    _, decoder, _, _ = forward_flops(demo)
    without = demo.model_copy(update={"autoencoder": demo.autoencoder.model_copy(update={"equivariance_weight": 0.0})})
    less = work(demo, 1000)["autoencoder"].amount - work(without, 1000)["autoencoder"].amount
    optimiser = demo.autoencoder.optimiser
    assert less == pytest.approx(3 * optimiser.steps * optimiser.batch_size * decoder / 8)


def test_a_study_without_drawing_decoder_spares_its_work(demo):
    without = demo.model_copy(update={"decoder": demo.decoder.model_copy(update={"network": None})})
    found, before = work(without, 1000), work(demo, 1000)
    assert set(before) - set(found) == {"decoder"}
    assert found["generate"].amount < before["generate"].amount and found["tone"].amount < before["tone"].amount
    assert found["diffusion"] == before["diffusion"]
    longer = demo.decoder.model_copy(update={"optimiser": config.DecoderOptimiser(steps=1600, batch_size=12)})
    shorter = demo.decoder.model_copy(update={"optimiser": config.DecoderOptimiser(steps=800, batch_size=12)})
    amounts = [work(demo.model_copy(update={"decoder": one}), 9)["decoder"].amount for one in (longer, shorter)]
    assert amounts[0] == pytest.approx(2 * amounts[1])


def test_jobs_that_run_beside_each_other_take_as_long_as_one():
    found = [Estimate("generate", 10, 0.5, True, 0.0), Estimate("privacy", 1, 2.0, False, 0.0)]
    assert wall_hours(found, 1) == 7.0
    assert wall_hours(found, 5) == 3.0
    assert wall_hours(found, 4) == 3.5


def test_a_folder_without_results_is_refused(demo, tmp_path):
    with pytest.raises(UserError, match=r"expected the results of a finished study"):
        list(estimates(demo, 1000, tmp_path))
