"""Samplers against distributions with a known exact denoiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import MixtureDenoiser, process_of, standard_normal
from torch import Tensor

from meddiff_steps.config import DEFAULT_STEPS
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.samplers import FLOW_SAMPLERS, evaluations, sample, solver

PAIRS = [(s, p) for p in ("epsilon", "v_prediction") for s in DEFAULT_STEPS if s != "flow"] + [
    (s, "flow") for s in FLOW_SAMPLERS
]


def gaussian_steps(n: int, seed: int = 7):
    """Standard normal step noise (n, 1, 1) whose mean is 0 and std is 1 at every step."""
    return lambda i: standard_normal(n, seed * 10_000 + i)[
        torch.randperm(n, generator=torch.Generator().manual_seed(i))
    ]


def run(
    sampler: str,
    prediction_type: str,
    n: int = 4000,
    mean: float = 0.0,
    std: float = 0.5,
    means=(0.0,),
    steps=None,
    **settings,
) -> Tensor:
    process = process_of(prediction_type, **settings)
    return sample(
        MixtureDenoiser(process, std, means),
        standard_normal(n),
        torch.full((n, 1), mean),
        process,
        sampler,
        steps,
        step_noise=gaussian_steps(n),
    )


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_default_steps_recover_the_spread_of_gaussian_data(sampler, prediction_type):
    x = run(sampler, prediction_type)
    assert abs(x.mean().item()) < 0.01
    assert x.std(correction=0).item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_default_steps_recover_a_shifted_mean_given_by_a_covariate(sampler, prediction_type):
    x = run(sampler, prediction_type, n=1000, mean=2.0)
    assert x.mean().item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_default_steps_recover_a_mixture(sampler, prediction_type):
    x = run(sampler, prediction_type, n=1000, std=0.25, means=(-1.0, 1.0))
    assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    for side in (x[x > 0], -x[x < 0]):
        assert side.mean().item() == pytest.approx(1.0, abs=0.03)
        assert side.std().item() == pytest.approx(0.25, rel=0.10)


@pytest.mark.parametrize("sampler", [s for s in DEFAULT_STEPS if s not in ("flow", "ddpm")])
@pytest.mark.parametrize(
    "settings",
    [{"schedule": "cosine"}, {"schedule": "linear"}, {"zero_terminal_snr": True}],
    ids=["cosine", "linear", "zero-snr"],
)
def test_other_schedules_are_sampled_as_well(sampler, settings):
    assert run(sampler, "v_prediction", n=1000, **settings).std(correction=0).item() == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_any_number_of_steps_is_finite_and_costs_what_is_announced(sampler, prediction_type, steps):
    process = process_of(prediction_type, zero_terminal_snr=prediction_type == "v_prediction")
    oracle = MixtureDenoiser(process)
    x = sample(oracle, standard_normal(64), torch.zeros(64, 1), process, sampler, steps, step_noise=gaussian_steps(64))
    assert torch.isfinite(x).all()
    assert (
        len(oracle.calls)
        == evaluations(sampler, steps)
        == len(solver(sampler, process, steps, gaussian_steps(64)).timesteps)
    )


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_latents_are_not_clipped(sampler, prediction_type):
    assert run(sampler, prediction_type, n=500, std=3.0).abs().max().item() > 6.0


@pytest.mark.parametrize("steps", [30, 75, 130, 600])
def test_ddim_steps_land_on_the_levels_that_the_network_is_told(steps):
    """With a stride of 1000 // steps, 600 steps would begin at timestep 599 and 130 steps leave noise behind."""
    assert run("ddim", "v_prediction", n=500, std=1e-3, steps=steps).std().item() < 0.04
    assert solver("ddim", process_of(), steps).timesteps[0] > 950
    assert solver("ddim", process_of(), steps).timesteps[-1] == pytest.approx(0.0, abs=1e-9)


def test_ddpm_at_full_length_is_the_training_chain():
    process = process_of(num_train_timesteps=40)
    np.testing.assert_array_equal(
        solver("ddpm", process, step_noise=gaussian_steps(2)).timesteps, np.arange(39, -1, -1)
    )


def test_ddpm_agrees_with_the_posterior_of_ho_et_al():
    """Equations 6 and 7 of Ho et al. 2020, written out."""
    process = process_of("epsilon", num_train_timesteps=12)
    oracle, n = MixtureDenoiser(process), 32
    noises = gaussian_steps(n)
    x = standard_normal(n).double()
    power = process.alphas_cumprod
    assert power is not None
    for i, t in enumerate(range(11, -1, -1)):
        prev = power[t - 1] if t else 1.0
        beta = 1 - power[t] / prev
        noise = oracle(x.float(), torch.full((n,), float(t)), torch.zeros(n, 1)).double()
        x0 = (x - (1 - power[t]) ** 0.5 * noise) / power[t] ** 0.5
        x = prev**0.5 * beta / (1 - power[t]) * x0 + (power[t] / prev) ** 0.5 * (1 - prev) / (1 - power[t]) * x
        if t:
            x = x + ((1 - prev) / (1 - power[t]) * beta) ** 0.5 * noises(i)
    ours = sample(oracle, standard_normal(n), torch.zeros(n, 1), process, "ddpm", step_noise=noises)
    torch.testing.assert_close(ours.double(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_a_sample_depends_on_its_own_noise_and_covariates_only(sampler, prediction_type):
    """Same bits in another slot of the batch and beside other companions; no global random state is used."""
    process, steps, n = process_of(prediction_type), 5, 8
    noise = torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    covariates = torch.linspace(-1, 1, n)[:, None]
    added = torch.randn(steps, n, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(123)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    def generate(order: Tensor, start: Tensor) -> Tensor:
        return sample(
            MixtureDenoiser(process),
            start[order],
            covariates[order],
            process,
            sampler,
            steps,
            1.7,
            step_noise=lambda i: added[i][order],
        )

    straight = generate(torch.arange(n), noise)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(generate(order, noise), straight[order], rtol=0, atol=0)
    others = torch.where(torch.arange(n)[:, None, None, None] == 2, noise, noise * 3 + 1)
    torch.testing.assert_close(generate(torch.arange(n), others)[2], straight[2], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_guidance_scale_follows_the_formula_and_takes_the_passes_it_needs():
    process = process_of()
    noise, covariates = standard_normal(6), torch.full((6, 1), 1.5)

    def result(scale: float) -> tuple[Tensor, list[Tensor]]:
        oracle = MixtureDenoiser(process)
        return sample(oracle, noise, covariates, process, "ddim", 1, scale), oracle.calls

    conditional, calls = result(1.0)
    assert len(calls) == 1 and torch.equal(calls[0], covariates)
    unconditional, calls = result(0.0)
    assert len(calls) == 1 and torch.isnan(calls[0]).all()
    guided, calls = result(2.5)
    assert [c.shape for c in calls] == [(6, 1), (6, 1)] and torch.isnan(calls[1]).all()
    # One step is linear in the prediction, so the formula holds for the sample, too.
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_guidance_acts_at_every_evaluation(sampler, prediction_type):
    """Replacing the estimate by a known image ends at that image, whatever the sampler (as in inpainting)."""
    process, n, steps = process_of(prediction_type), 16, 6
    known = torch.linspace(-1, 1, n).reshape(n, 1, 1)
    seen = []

    def guidance(x: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.shape == (n,) and not x.requires_grad
        seen.append(float(timesteps[0]))
        return known - x0

    x = sample(
        MixtureDenoiser(process),
        standard_normal(n),
        torch.zeros(n, 1),
        process,
        sampler,
        steps,
        step_noise=gaussian_steps(n),
        guidance=guidance,
    )
    torch.testing.assert_close(x, known, atol=1e-4, rtol=0)
    assert len(seen) == evaluations(sampler, steps)


def test_guidance_by_the_gradient_of_a_likelihood_conditions_the_sample():
    """Prior N(0, 0.5^2) and a measurement y = x0 + N(0, 0.5^2) have the posterior mean y / 2 and std 0.5 / sqrt(2)."""
    process, y, spread = process_of(), 1.0, 0.5

    def guidance(x: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (v.reshape(-1, 1, 1).float() for v in process.alpha_sigma(timesteps))
        uncertain = spread**2 + 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)  # var(y | x)
        score = torch.autograd.grad((-((y - x0) ** 2) / (2 * uncertain)).sum(), x)[0]
        return sigma**2 / alpha * score

    n = 1000
    x = sample(
        MixtureDenoiser(process),
        standard_normal(n),
        torch.zeros(n, 1),
        process,
        "dpmpp",
        40,
        guidance=guidance,
        guidance_gradients=True,
    )
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.5 / 2**0.5, rel=0.05)
    assert not x.requires_grad


def test_progress_is_reported_with_the_estimate():
    seen = []
    process = process_of()
    sample(
        MixtureDenoiser(process),
        standard_normal(4),
        torch.zeros(4, 1),
        process,
        "heun",
        3,
        on_step=lambda i, x0: seen.append((i, x0.shape)),
    )
    assert seen == [(i, (4, 1, 1)) for i in range(5)]


def test_half_precision_output_of_the_network_is_promoted():
    process = process_of()
    oracle = MixtureDenoiser(process)
    x = sample(lambda *a: oracle(*a).bfloat16(), standard_normal(100), torch.zeros(100, 1), process, "dpmpp")
    assert x.dtype == torch.float32 and x.std().item() == pytest.approx(0.5, rel=0.07)


@pytest.mark.parametrize(
    ("sampler", "prediction_type", "steps", "message"),
    [
        ("euler", "epsilon", 10, "no such sampler; there are ddpm"),
        ("ddim", "flow", 10, "use one of flow, dpmpp, unipc"),
        ("flow", "v_prediction", 10, "needs a model with prediction_type: flow"),
        ("dpmpp", "epsilon", 0, "at least 1, found 0"),
        ("ddpm", "epsilon", 1001, "at most the 1000 steps"),
    ],
)
def test_what_cannot_be_sampled_is_refused(sampler, prediction_type, steps, message):
    with pytest.raises(UserError, match=message):
        solver(sampler, process_of(prediction_type), steps)


def test_ddpm_never_draws_its_own_noise():
    with pytest.raises(ValueError, match="give step_noise"):
        solver("ddpm", process_of())
