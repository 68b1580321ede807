"""Samplers against distributions with a known exact denoiser, against diffusers, and against their own order."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers_oracle import RUNS
from oracle import MixtureDenoiser, process_of, standard_normal, told
from torch import Tensor

import meddiff_steps
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import SAMPLERS, default_steps, evaluations, samplers_of
from meddiff_steps.diffusion.sampling import levels_of, sample

PAIRS = [(s, p) for p in ("epsilon", "v_prediction", "flow") for s in samplers_of(p)]


def gaussian_steps(n: int, seed: int = 7):
    """Standard normal step noise (n, 1, 1) whose mean is 0 and std is 1 at every step."""

    def noise(i: int) -> Tensor:
        shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(i))
        return standard_normal(n, seed * 10_000 + i)[shuffled]

    return noise


def run(sampler: str, prediction_type: str, n=4000, mean=0.0, std=0.5, means=(0.0,), steps=None, **settings) -> Tensor:
    process = process_of(prediction_type, **settings)
    oracle, noise = MixtureDenoiser(process, std, means), gaussian_steps(n)
    return sample(
        oracle, standard_normal(n), told(mean, n), process, sampler, num_inference_steps=steps, step_noise=noise
    )


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_default_steps_recover_the_spread_of_gaussian_data(sampler, prediction_type):
    """`default_steps` says what was measured."""
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


@pytest.mark.parametrize("sampler", [s for s in samplers_of("v_prediction") if not SAMPLERS.entry(s)["stochastic"]])
@pytest.mark.parametrize("settings", [{"schedule": "cosine"}, {"schedule": "linear"}, {"zero_terminal_snr": True}])
def test_other_schedules_are_sampled_as_well(sampler, settings):
    x = run(sampler, "v_prediction", n=1000, **settings)
    assert x.std(correction=0).item() == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_any_number_of_steps_is_finite_and_costs_what_is_announced(sampler, prediction_type, steps):
    process = process_of(prediction_type, zero_terminal_snr=prediction_type == "v_prediction")
    oracle, noise = MixtureDenoiser(process), gaussian_steps(64)
    condition = told(0.0, 64)
    x = sample(oracle, standard_normal(64), condition, process, sampler, num_inference_steps=steps, step_noise=noise)
    assert torch.isfinite(x).all()
    assert len(oracle.calls) == evaluations(sampler, steps)
    # Every level is asked at exactly its timestep.
    timesteps = levels_of(sampler, process, steps).timesteps
    assert len(timesteps) == steps and set(oracle.timesteps) == set(np.float32(timesteps).tolist())


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_latents_are_not_clipped(sampler, prediction_type):
    assert run(sampler, prediction_type, n=500, std=3.0).abs().max().item() > 6.0


@pytest.mark.parametrize("steps", [30, 75, 130, 600])
def test_ddim_steps_land_on_the_levels_that_the_network_is_told(steps):
    """With a stride of 1000 // steps, 600 steps would begin at timestep 599 and 130 steps leave noise behind."""
    assert run("ddim", "v_prediction", n=500, std=1e-3, steps=steps).std().item() < 0.04
    timesteps = levels_of("ddim", process_of(), steps).timesteps
    assert timesteps[0] > 950 and timesteps[-1] == pytest.approx(0.0, abs=1e-9)


# -------------------------------------------------------------------------------------------- against others


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize(("sampler", "prediction_type"), [pair for pair in PAIRS if pair[0] in RUNS])
def test_solvers_agree_with_diffusers_on_the_same_levels(sampler, prediction_type, steps):
    """In float64, but for DPM-Solver++ and Euler on a flow, of which diffusers casts the state to float32."""
    process, n = process_of(prediction_type), 100
    oracle, condition, noises = MixtureDenoiser(process, 0.25, (-1.0, 1.0)), told(0.3, n), gaussian_steps(n)
    levels, noise = levels_of(sampler, process, steps), standard_normal(n).double()

    def predict(x: Tensor, timestep: float) -> Tensor:
        timesteps = torch.full((n,), timestep, dtype=torch.float64)
        return process.to_x0(oracle(x, timesteps.float(), condition), x, timesteps)

    begin = noise * math.hypot(levels.alpha[0], levels.sigma[0])
    theirs = RUNS[sampler](sampler, levels, process.is_flow, predict, begin, noises)
    ours = sample(oracle, noise, condition, process, sampler, num_inference_steps=steps, step_noise=noises)
    assert ours.dtype == torch.float64
    tolerance = 2e-6 if sampler in ("dpmpp", "flow") else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_flow", [False, True])
def test_dpmpp_agrees_with_the_formulas_of_diffusers_in_double_precision(is_flow):
    from diffusers import DPMSolverMultistepScheduler

    process = process_of("flow" if is_flow else "v_prediction")
    levels = levels_of("dpmpp", process, 12)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=is_flow, final_sigmas_type="zero")
    scheduler.sigmas = torch.tensor(levels.sigma if is_flow else levels.ratio, dtype=torch.float64)
    estimates = torch.randn(12, 1, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = SAMPLERS.load("dpmpp").solver(levels, None)
    ours = theirs = torch.linspace(-2, 2, 9, dtype=torch.float64)[None, None]
    for i in range(levels.steps):
        scheduler._step_index = i
        if i in (0, levels.steps - 1):
            theirs = scheduler.dpm_solver_first_order_update(estimates[i], sample=theirs)
        else:
            pair = [estimates[i - 1], estimates[i]]
            theirs = scheduler.multistep_dpm_solver_second_order_update(pair, sample=theirs)
        ours = step(i, ours, lambda x, level: estimates[level])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


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
        noise = oracle(x, torch.full((n,), float(t)), told(0.0, n))
        x0 = (x - (1 - power[t]) ** 0.5 * noise) / power[t] ** 0.5
        mean = prev**0.5 * beta / (1 - power[t]) * x0 + (power[t] / prev) ** 0.5 * (1 - prev) / (1 - power[t]) * x
        x = mean + ((1 - prev) / (1 - power[t]) * beta) ** 0.5 * noises(i).double() if t else mean
    ours = sample(oracle, standard_normal(n).double(), told(0.0, n), process, "ddpm", step_noise=noises)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_ddpm_at_full_length_is_the_training_chain():
    process = process_of(num_train_timesteps=40)
    assert default_steps("ddpm", 40) == 40
    assert levels_of("ddpm", process).timesteps == tuple(range(39, -1, -1))


def test_ddpm_has_the_spread_that_its_chain_gives_gaussian_data():
    """The chain is linear there, so that its variance follows exactly: -1.4 % in 1000 steps."""
    process = process_of()
    oracle, levels, variance = MixtureDenoiser(process), levels_of("ddpm", process), 1.0
    for i in range(levels.steps):
        gain = levels.alpha[i] * 0.25 / oracle.spread(levels.timesteps[i]) ** 2  # x0 = gain * x
        shrink, rest = levels.alpha[i] / levels.alpha[i + 1], levels.sigma[i + 1] / levels.sigma[i]
        added = 1 - shrink**2
        mean = levels.alpha[i + 1] * added / levels.sigma[i] ** 2 * gain + shrink * rest**2
        variance = mean**2 * variance + added * rest**2
    assert math.sqrt(variance) == pytest.approx(0.5 * (1 - 0.0145), rel=1e-4)
    assert run("ddpm", "v_prediction").std(correction=0).item() == pytest.approx(math.sqrt(variance), rel=0.02)


#: Order of convergence; PNDM's fixed Adams-Bashforth weights are those of equidistant levels, so that it has 2 of 4.
ORDER = {"ddim": 1, "flow": 1, "heun": 2, "pndm": 2, "dpmpp": 2, "unipc": 3}


@pytest.mark.parametrize(("sampler", "prediction_type"), [pair for pair in PAIRS if pair[0] in ORDER])
def test_the_error_falls_with_the_order_of_the_method(sampler, prediction_type):
    """Against the exact flow of Gaussian data, from the first level to the last."""
    process = process_of(prediction_type)
    stop = 20.0 if process.is_flow else 0.0
    oracle, noise = MixtureDenoiser(process), torch.ones(1, 1, 1, dtype=torch.float64)

    def error(steps: int) -> float:
        levels = levels_of(sampler, process, steps)
        x = sample(oracle, noise, told(0.0), process, sampler, num_inference_steps=steps, stop=stop)
        begin = math.hypot(levels.alpha[0], levels.sigma[0])
        return abs(x.item() / (begin * oracle.spread(stop) / oracle.spread(levels.timesteps[0])) - 1)

    order = ORDER[sampler]
    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.15)
    assert math.log2(error(80) / error(160)) == pytest.approx(order, abs=0.1)


# ------------------------------------------------------------------------------------------------ what is there


def test_what_a_sampler_says_of_itself():
    for name in SAMPLERS.names():
        entry = SAMPLERS.entry(name)
        assert entry["summary"] and entry["source"] and entry["default_steps"] > 0
        assert evaluations(name, 1) == 1
        assert set(entry["processes"]) <= {"variance_preserving", "flow"}
        assert isinstance(entry["stochastic"], bool)
    assert {"flow", "dpmpp", "unipc"} <= set(samplers_of("flow")) and "ddim" not in samplers_of("flow")
    assert {"ddpm", "ddim", "dpmpp"} <= set(samplers_of("epsilon")) and "flow" not in samplers_of("epsilon")


@pytest.mark.parametrize(
    ("sampler", "one", "twenty"), [("ddim", 1, 20), ("heun", 1, 39), ("pndm", 1, 21), ("unipc", 1, 20)]
)
def test_evaluations(sampler, one, twenty):
    assert evaluations(sampler, 1) == one and evaluations(sampler, 20) == twenty


def test_asking_what_there_is_imports_no_torch():
    code = (
        "import sys; from meddiff_steps.core.registries import *; default_steps('ddim', 10);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sampling_knows_nothing_of_configs():
    code = (
        "import sys; from meddiff_steps.diffusion import inversion, sampling; sampling.SAMPLERS.load('unipc');"
        "sys.exit(any(name.startswith(('meddiff_steps.config', 'diffusers', 'pydantic')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_diffusers_is_for_tests_only():
    for path in Path(meddiff_steps.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import diffusers" not in text and "from diffusers" not in text, path


@pytest.mark.parametrize(
    ("sampler", "prediction_type", "steps", "message"),
    [
        ("euler", "epsilon", 10, "there is no sampler 'euler'"),
        ("ddim", "flow", 10, "use one of dpmpp, unipc, flow"),
        ("flow", "v_prediction", 10, "cannot sample a model with prediction_type: v_prediction; use one of"),
        ("dpmpp", "epsilon", 0, "at least 1, found 0"),
        ("ddpm", "epsilon", 1001, "at most the 1000 steps"),
    ],
)
def test_what_cannot_be_sampled_is_refused(sampler, prediction_type, steps, message):
    with pytest.raises(UserError, match=message):
        levels_of(sampler, process_of(prediction_type), steps)


def test_ddpm_never_draws_its_own_noise():
    process = process_of()
    with pytest.raises(ValueError, match="give step_noise"):
        sample(MixtureDenoiser(process), standard_normal(4), told(0.0, 4), process, "ddpm", num_inference_steps=3)
