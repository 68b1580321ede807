"""Runs of a sampler: whole, in parts, in branches, and under classifier-free guidance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers_oracle import RUNS
from oracle import MixtureDenoiser, process_of, standard_normal, told
from test_samplers import PAIRS, gaussian_steps
from torch import Tensor

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import evaluations
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.sampling import levels_of, sample

MULTISTEP = ("pndm", "dpmpp", "unipc")
BIMODAL = {"std": 0.25, "means": (-1.0, 1.0)}


# ------------------------------------------------------------------------------------- a function of its arguments


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_a_sample_depends_on_its_own_noise_and_covariates_only(sampler, prediction_type):
    """Same bits in another slot of the batch and beside other companions; no global random state is used."""
    process, steps, n = process_of(prediction_type), 5, 8
    noise = torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    condition = told(torch.linspace(-1, 1, n).tolist())
    added = torch.randn(steps, n, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(123)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    def generate(order: Tensor, begin: Tensor) -> Tensor:
        options = {"num_inference_steps": steps, "guidance_scale": 1.7, "step_noise": lambda i: added[i][order]}
        return sample(MixtureDenoiser(process), begin[order], condition[order], process, sampler, **options)

    straight = generate(torch.arange(n), noise)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(generate(order, noise), straight[order], rtol=0, atol=0)
    others = torch.where(torch.arange(n)[:, None, None, None] == 2, noise, noise * 3 + 1)
    torch.testing.assert_close(generate(torch.arange(n), others)[2], straight[2], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_half_precision_output_of_the_network_is_promoted():
    process = process_of()
    oracle = MixtureDenoiser(process)
    x = sample(lambda *a: oracle(*a).bfloat16(), standard_normal(100), told(0.0, 100), process, "dpmpp")
    assert x.dtype == torch.float32 and x.std().item() == pytest.approx(0.5, rel=0.07)


def test_half_precision_noise_is_promoted_and_not_changed():
    process = process_of()
    noise = standard_normal(4).half()
    before = noise.clone()
    assert sample(MixtureDenoiser(process), noise, told(0.0, 4), process, "dpmpp").dtype == torch.float32
    assert torch.equal(noise, before)


def test_progress_is_reported_with_the_estimate():
    seen = []
    process = process_of()
    sample(
        MixtureDenoiser(process),
        standard_normal(4),
        told(0.0, 4),
        process,
        "heun",
        num_inference_steps=3,
        on_step=lambda i, x0: seen.append((i, x0.shape)),
    )
    assert seen == [(i, (4, 1, 1)) for i in range(5)]


def test_the_denoiser_sees_maps_and_tokens():
    process, seen = process_of(), []

    def denoiser(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        seen.append(condition)
        return torch.zeros_like(x)

    condition = Condition(torch.zeros(2, 1), {"scan": torch.ones(2, 1, 4)}, {"report": torch.ones(2, 3, 5)})
    sample(denoiser, torch.zeros(2, 1, 4), condition, process, "ddim", num_inference_steps=1, guidance_scale=2.0)
    assert seen[0] is condition
    assert torch.equal(seen[1].maps["scan"], condition.maps["scan"])
    assert seen[1].tokens["report"].isnan().all() and seen[1].covariates.isnan().all()


def test_subjects_that_do_not_fit_are_refused():
    process = process_of()
    with pytest.raises(ValueError, match="condition: 3 rows, but x has 4"):
        sample(MixtureDenoiser(process), standard_normal(4), told(0.0, 3), process, "ddim")


# ------------------------------------------------------------------------------------------------------ in parts


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
@pytest.mark.parametrize(("steps", "bound"), [(10, 0.1), (25, 0.002)])
def test_two_parts_are_the_whole(sampler, prediction_type, steps, bound):
    """Exactly, where a step needs nothing but its state; else but for what beginning anew with a lower order costs."""
    process, n = process_of(prediction_type), 40
    noise, condition = standard_normal(n), told(0.2, n)
    options = {"num_inference_steps": steps, "step_noise": gaussian_steps(n)}
    oracle = MixtureDenoiser(process, **BIMODAL)
    whole = sample(oracle, noise, condition, process, sampler, **options)
    calls = len(oracle.calls)
    t = levels_of(sampler, process, steps).timesteps[steps // 2]
    midway = sample(oracle, noise, condition, process, sampler, stop=t, **options)
    twice = sample(oracle, midway, condition, process, sampler, start=t, **options)
    assert (twice - whole).abs().max().item() <= (bound if sampler in MULTISTEP else 1e-6)
    assert len(oracle.calls) == 2 * calls + (sampler == "pndm")  # whose beginning takes one more


@pytest.mark.parametrize(("sampler", "prediction_type"), [pair for pair in PAIRS if pair[0] in RUNS])
def test_a_state_is_what_the_exact_flow_makes_of_it(sampler, prediction_type):
    """`stop` between levels ends at exactly that timestep, and `start` between levels goes on from there."""
    process, n = process_of(prediction_type), 2000
    oracle, condition, noise = MixtureDenoiser(process), told(0.0, n), standard_normal(n)
    steps = 1000 if sampler == "ddpm" else 200
    options = {"num_inference_steps": steps, "step_noise": gaussian_steps(n)}
    t = 512.345
    midway = sample(oracle, noise, condition, process, sampler, stop=t, **options)
    assert midway.std(correction=0).item() == pytest.approx(oracle.spread(t), rel=0.02)
    x = sample(oracle, oracle.spread(t) * noise, condition, process, sampler, start=t, **options)
    assert x.std(correction=0).item() == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "unipc", "heun", "pndm", "ddpm"])
def test_a_run_from_midway_asks_at_start_and_at_the_cleaner_levels(sampler):
    process = process_of()
    own = levels_of(sampler, process, 10).timesteps
    start = (own[3] + own[4]) / 2
    levels = levels_of(sampler, process, 10, start=start)
    assert levels.timesteps == (start, *own[4:]) and levels.first == 3
    oracle = MixtureDenoiser(process)
    sample(
        oracle,
        standard_normal(4),
        told(0.0, 4),
        process,
        sampler,
        num_inference_steps=10,
        start=start,
        step_noise=gaussian_steps(4),
    )
    assert len(oracle.calls) == evaluations(sampler, levels.steps)
    assert set(oracle.timesteps) == set(np.float32(levels.timesteps).tolist())


def test_noise_of_a_step_is_that_of_the_full_run():
    process, asked = process_of(), []

    def noise(i: int) -> Tensor:
        asked.append(i)
        return torch.zeros(2, 1, 1)

    def run(**part: float) -> list[int]:
        asked.clear()
        oracle = MixtureDenoiser(process)
        sample(
            oracle, standard_normal(2), told(0.0, 2), process, "ddpm", num_inference_steps=6, step_noise=noise, **part
        )
        return list(asked)

    own = levels_of("ddpm", process, 6).timesteps
    assert run() == [0, 1, 2, 3, 4]  # the last step adds none
    assert run(start=own[2]) == [2, 3, 4]
    assert run(start=own[2] - 1) == run(start=own[2] + 1) == [2, 3, 4]
    assert run(stop=own[2]) == [0, 1]
    assert run(start=own[1], stop=own[3]) == [1, 2]


def test_a_branch_has_its_own_condition_from_where_it_leaves():
    """Counterfactual: the same state goes on under two conditions; one is the unbranched run, the other moves."""
    process, n = process_of(), 200
    oracle, noise, condition = MixtureDenoiser(process), standard_normal(n), told(0.0, n)
    t = levels_of("ddim", process).timesteps[30]
    state = sample(oracle, noise, condition, process, "ddim", stop=t)
    stayed, moved = (sample(oracle, state, c, process, "ddim", start=t) for c in (condition, condition.moved(0, 1.0)))
    torch.testing.assert_close(stayed, sample(oracle, noise, condition, process, "ddim"), rtol=0, atol=1e-6)
    difference = moved - stayed
    assert difference.mean().item() > 0.2
    assert difference.std().item() < 1e-3  # every subject by as much, keeping what makes it different from others


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_a_run_may_start_at_the_very_noisiest_timestep(sampler, prediction_type):
    """On a flow that is pure noise, where alpha is 0 and the log-SNR is infinite."""
    process, n = process_of(prediction_type), 500
    options = {"start": process.last_timestep, "step_noise": gaussian_steps(n)}
    if sampler == "ddpm":
        options["num_inference_steps"] = 300
    x = sample(MixtureDenoiser(process), standard_normal(n), told(0.0, n), process, sampler, **options)
    assert x.std(correction=0).item() == pytest.approx(0.5, rel=0.07)


def test_nothing_between_start_and_stop_leaves_the_state_as_it_is():
    process = process_of()
    x = standard_normal(4)
    oracle = MixtureDenoiser(process)
    assert torch.equal(sample(oracle, x, told(0.0, 4), process, "dpmpp", start=300.0, stop=300.0), x)
    assert not oracle.calls


@pytest.mark.parametrize(
    ("prediction_type", "ends", "message"),
    [
        ("epsilon", {"start": 1000.0}, "start: expected a timestep from 0 up to 999, found 1000"),
        ("epsilon", {"start": float("nan")}, "start: expected a timestep"),
        ("flow", {"start": 0.0}, "start: expected a timestep above 0, which is clean already"),
        ("epsilon", {"stop": -1.0}, "stop: expected a timestep from 0 to 999, found -1"),
        ("epsilon", {"start": 200.0, "stop": 300.0}, "stop: expected a timestep cleaner than start, which is 200"),
        ("epsilon", {"stop": 999.0}, "stop: expected a timestep below 975.*where the run begins"),
    ],
)
def test_impossible_ends_are_refused(prediction_type, ends, message):
    with pytest.raises(UserError, match=message):
        levels_of("dpmpp", process_of(prediction_type), **ends)


# ------------------------------------------------------------------------------------- classifier-free guidance


def test_guidance_scale_follows_the_formula_and_takes_the_passes_it_needs():
    process = process_of()
    noise, condition = standard_normal(6), told(1.5, 6)

    def result(scale: float) -> tuple[Tensor, list[Condition]]:
        oracle = MixtureDenoiser(process)
        x = sample(oracle, noise, condition, process, "ddim", num_inference_steps=1, guidance_scale=scale)
        return x, oracle.calls

    conditional, calls = result(1.0)
    assert len(calls) == 1 and calls[0] is condition
    unconditional, calls = result(0.0)
    assert len(calls) == 1 and calls[0].covariates.isnan().all()
    guided, calls = result(2.5)
    assert [c.covariates.shape for c in calls] == [(6, 1), (6, 1)] and calls[1].covariates.isnan().all()
    # One step is linear in the prediction, so the formula holds for the sample, too.
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_outside_the_interval_there_is_one_conditional_pass(prediction_type):
    process = process_of(prediction_type)
    levels = levels_of("dpmpp", process, 12)
    interval = (levels.ratio[9], levels.ratio[4])  # above the lower, up to the upper
    seen = []
    oracle = MixtureDenoiser(process)

    def run(scale: float, on_step=None) -> Tensor:
        options = {"guidance_scale": scale, "guidance_interval": interval, "on_step": on_step}
        noise, condition = standard_normal(6), told(1.5, 6)
        return sample(oracle, noise, condition, process, "dpmpp", num_inference_steps=12, **options)

    def note(i: int, x0: Tensor) -> None:
        seen.append([bool(call.covariates.isnan().all()) for call in oracle.calls])
        oracle.calls.clear()

    run(3.0, note)
    assert seen == [[False, True] if 4 <= i < 9 else [False] for i in range(12)]
    seen.clear()
    run(0.0, note)
    assert seen == [[True] if 4 <= i < 9 else [False] for i in range(12)]
    plain = sample(oracle, standard_normal(6), told(1.5, 6), process, "dpmpp", num_inference_steps=12)
    assert torch.equal(run(1.0), plain)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_an_interval_without_levels_is_refused(interval):
    process = process_of()
    with pytest.raises(ValueError, match="0 <= low < high"):
        sample(MixtureDenoiser(process), standard_normal(2), told(0.0, 2), process, "ddim", guidance_interval=interval)
