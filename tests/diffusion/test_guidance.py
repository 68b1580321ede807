"""Guidance: its hooks, how several compose, and a classifier whose posterior is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import MixtureDenoiser, process_of, standard_normal, told
from test_samplers import PAIRS, gaussian_steps
from torch import Tensor

from meddiff_steps.core.registries import evaluations
from meddiff_steps.diffusion.guidance import BaseGuidance, ClassifierGuidance, State, gradient, predict
from meddiff_steps.diffusion.sampling import levels_of, sample


def guided(
    guidance, sampler="dpmpp", prediction_type="v_prediction", n=16, steps=6, denoiser=None, **options
) -> Tensor:
    process = process_of(prediction_type)
    return sample(
        denoiser or MixtureDenoiser(process),
        standard_normal(n),
        told(0.0, n),
        process,
        sampler,
        num_inference_steps=steps,
        guidance=guidance,
        step_noise=gaussian_steps(n),
        **options,
    )


class Known(BaseGuidance):
    """Replaces the estimate by a known image, as inpainting does where the image is known."""

    def __init__(self, known: Tensor) -> None:
        self.known, self.seen = known, []

    def estimate(self, state: State) -> Tensor:
        assert not state.x.requires_grad
        self.seen.append(state)
        return self.known


class Replaced(BaseGuidance):
    """Replaces the state by a known image at the same noise level, with noise keyed by the step."""

    def __init__(self, known: Tensor) -> None:
        self.known, self.seen = known, []

    def after(self, state: State, x: Tensor) -> Tensor:
        self.seen.append(state)
        return state.alpha_next * self.known + state.sigma_next * gaussian_steps(len(x))(state.step)


class Shift(BaseGuidance):
    """Adds to the estimate, then to the state."""

    def __init__(self, name: str, log: list[str], times: float = 1.0, plus: float = 0.0) -> None:
        self.name, self.log, self.times, self.plus = name, log, times, plus

    def estimate(self, state: State) -> Tensor:
        self.log.append(f"{self.name} estimate {state.step}")
        return self.times * state.x0 + self.plus

    def after(self, state: State, x: Tensor) -> Tensor:
        self.log.append(f"{self.name} after {state.step}")
        return self.times * x + self.plus


# --------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_an_estimate_is_corrected_at_every_evaluation(sampler, prediction_type):
    """Replacing it by a known image ends at that image, whatever the sampler."""
    guidance = Known(torch.linspace(-1, 1, 16).reshape(16, 1, 1))
    x = guided([guidance], sampler, prediction_type)
    torch.testing.assert_close(x, guidance.known, atol=1e-4, rtol=0)
    assert len(guidance.seen) == evaluations(sampler, 6)
    for state in guidance.seen:
        assert state.timesteps.shape == (16,) and state.timesteps.dtype == torch.float32
        assert state.alpha.shape == state.sigma.shape == (16, 1, 1)


@pytest.mark.parametrize(("sampler", "prediction_type"), PAIRS)
def test_a_state_is_corrected_after_every_step(sampler, prediction_type):
    """The next evaluation, and the result, are of the state that guidance left, also where a corrector follows."""
    process, asked = process_of(prediction_type), []
    guidance, oracle = Replaced(torch.linspace(-1, 1, 16).reshape(16, 1, 1)), MixtureDenoiser(process)

    def denoiser(x, timesteps, condition):
        asked.append(x.clone())
        return oracle(x, timesteps, condition)

    x = guided([guidance], sampler, prediction_type, denoiser=denoiser)
    assert torch.equal(x, guidance.known)
    assert [state.step for state in guidance.seen] == list(range(6))
    levels = levels_of(sampler, process, 6)
    for state, i in zip(guidance.seen, range(6), strict=True):
        # That of the step's first evaluation, also where a step has two.
        assert state.timesteps[0].item() == pytest.approx(levels.timesteps[i], rel=1e-6)
        assert (state.alpha_next, state.sigma_next) == (levels.alpha[i + 1], levels.sigma[i + 1])
    wanted = guidance.after(guidance.seen[2], x)
    assert any(torch.equal(state, wanted) for state in asked)


def test_what_guidance_did_to_a_state_survives_the_corrector_of_unipc():
    """A nudge after step 0 must not be taken back when step 1 corrects where step 0 led."""

    class Nudge(BaseGuidance):
        def __init__(self, by: float) -> None:
            self.by = by

        def estimate(self, state: State) -> Tensor:
            return torch.zeros_like(state.x0)  # so that the only way of the nudge is through the state

        def after(self, state: State, x: Tensor) -> Tensor:
            return x + self.by if state.step == 0 else x

    levels = levels_of("unipc", process_of(), 6)
    stop = levels.timesteps[3]
    plain, nudged = (guided([Nudge(by)], "unipc", stop=stop) for by in (0.0, 1.0))
    torch.testing.assert_close(nudged - plain, torch.full_like(plain, levels.sigma[3] / levels.sigma[1]))


def test_several_compose_in_order():
    log: list[str] = []
    both = [Shift("first", log, times=2.0), Shift("second", log, plus=1.0)]
    x = guided(both, "ddim", steps=1)
    assert log == ["first estimate 0", "second estimate 0", "first after 0", "second after 0"]
    # One step to clean latents is the estimate itself: ((2 x0 + 1) * 2) + 1.
    torch.testing.assert_close(x, 4 * guided([], "ddim", steps=1) + 3)
    assert not torch.allclose(guided(both[::-1], "ddim", steps=1), x)


def test_hooks_of_heun_act_on_estimates_twice_and_on_states_once():
    log: list[str] = []
    guided([Shift("it", log)], "heun", steps=2)
    assert log == ["it estimate 0", "it estimate 0", "it after 0", "it estimate 1", "it after 1"]


def test_steps_are_numbered_as_in_a_full_run():
    log: list[str] = []
    start = levels_of("dpmpp", process_of(), 6).timesteps[4]
    guided([Shift("it", log)], start=start)
    assert log == ["it estimate 4", "it after 4", "it estimate 5", "it after 5"]


def test_guidance_that_changes_nothing_changes_nothing():
    assert torch.equal(guided([BaseGuidance(), BaseGuidance()]), guided([]))


# ----------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("sampler", "prediction_type"), [pair for pair in PAIRS if pair[1] != "epsilon"])
def test_classifier_guidance_draws_from_the_posterior(sampler, prediction_type):
    """With log p(y | x0) = 3 x0 the prior N(0, 0.5^2) becomes N(3 * 0.5^2, 0.5^2), and the guidance is exact."""
    steps = 1000 if sampler == "ddpm" else 100
    guidance = ClassifierGuidance(lambda x0: 3.0 * x0.sum((1, 2)))
    plain, x = (guided(g, sampler, prediction_type, n=500, steps=steps) for g in ([], [guidance]))
    assert x.mean().item() == pytest.approx(0.75, abs=0.02)
    assert x.std(correction=0).item() == pytest.approx(plain.std(correction=0).item(), rel=0.01)
    assert not x.requires_grad


def test_classifier_guidance_is_bayes_rule_for_a_measurement():
    """y = x0 + N(0, 0.5^2) has the posterior mean y / 2 and std 0.5 / sqrt(2). A classifier of x0 alone is not exact
    there, so this one is written with what is left open at each level, as guidance of one's own may be."""
    y, spread = 1.0, 0.5

    class Measured(BaseGuidance):
        needs_gradients = True

        def estimate(self, state: State) -> Tensor:
            uncertain = spread**2 + 0.25 * state.sigma**2 / (0.25 * state.alpha**2 + state.sigma**2)  # var(y | x)
            likelihood = (-((y - state.x0) ** 2) / (2 * uncertain)).sum((1, 2))
            return state.x0 + state.sigma**2 / state.alpha * gradient(likelihood, state)

    x = guided([Measured()], n=1000, steps=40)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_classifier_guidance_is_algorithm_2_of_dhariwal_and_nichol():
    x = torch.linspace(-1, 1, 6).reshape(6, 1, 1).requires_grad_()
    alpha, sigma = torch.full((6, 1, 1), 0.8), torch.full((6, 1, 1), 0.6)
    state = State(0, torch.full((6,), 300.0), alpha, sigma, x, x0=x**2)
    corrected = ClassifierGuidance(lambda x0: (x0**2).sum((1, 2)), scale=2.0).estimate(state)
    slope = 4 * x**3  # of log p = x0^2 = x^4
    noise = (x - alpha * x**2) / sigma - 2.0 * sigma * slope
    torch.testing.assert_close(corrected, (x - sigma * noise) / alpha)


def test_classifier_guidance_acts_within_its_interval():
    levels, seen = levels_of("dpmpp", process_of(), 6), []

    def log_probability(x0: Tensor) -> Tensor:
        seen.append(True)
        return x0.sum((1, 2))

    interval = (levels.ratio[4], levels.ratio[1])
    guided([ClassifierGuidance(log_probability, interval=interval)])
    assert len(seen) == 3
    with pytest.raises(ValueError, match="0 <= low < high"):
        ClassifierGuidance(log_probability, interval=(2.0, 1.0))


def test_gradients_reach_hooks_after_a_step_and_pass_through_several_guidances():
    """Two classifiers that pull in opposite directions cancel; the state after a step is pulled as in DPS."""
    up, down = (ClassifierGuidance(lambda x0, s=s: s * x0.sum((1, 2))) for s in (1.0, -1.0))
    torch.testing.assert_close(guided([up, down]), guided([]), rtol=0, atol=1e-5)

    class Pulled(BaseGuidance):
        needs_gradients = True

        def after(self, state: State, x: Tensor) -> Tensor:
            return x - 0.1 * gradient((state.x0**2).sum((1, 2)), state)

    for sampler in ("dpmpp", "heun", "unipc"):
        assert guided([Pulled(), up], sampler).abs().mean() < guided([up], sampler).abs().mean()


def test_without_gradients_the_network_is_run_without():
    process = process_of()
    oracle = MixtureDenoiser(process)

    def denoiser(x, timesteps, condition):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return oracle(x, timesteps, condition)

    guided([Shift("it", [])], denoiser=denoiser)


def test_asking_for_a_gradient_that_there_is_not_says_what_to_do():
    class Forgot(BaseGuidance):
        def estimate(self, state: State) -> Tensor:
            return state.x0 + gradient(state.x0.sum((1, 2)), state)

    with pytest.raises(ValueError, match="Set needs_gradients = True"):
        guided([Forgot()])
    x = torch.zeros(1, 1, 1, requires_grad=True)
    state = State(0, torch.zeros(1), torch.ones(1, 1, 1), torch.ones(1, 1, 1), x, x)
    with pytest.raises(ValueError, match="without detaching"):
        gradient(state.x0.detach().sum(), state)


def test_the_ratio_of_a_state_is_infinite_at_pure_noise():
    one, none = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
    state = State(0, torch.zeros(2), one, one / 2, one, one)
    assert state.ratio == 0.5
    assert replace(state, alpha=none, ratio=float("nan")).ratio == float("inf")
    pure = replace(state, alpha=none, ratio=float("inf"), x=one.clone().requires_grad_())
    assert ClassifierGuidance(lambda x0: x0.sum((1, 2))).estimate(pure) is pure.x0


def test_autoguidance_moves_away_from_a_guide_that_is_told_the_same():
    process, n = process_of(), 4
    oracle, calls = MixtureDenoiser(process), []

    def network(name, shift):
        def denoise(x, timesteps, condition):
            calls.append((name, condition))
            return oracle(x, timesteps, condition) + shift

        return denoise

    x, timesteps, condition = standard_normal(n), torch.full((n,), 500.0), told(0.3, n)
    good, poor = network("good", 0.0), network("poor", 0.25)
    plain = predict(good, x, timesteps, condition)
    found = predict(good, x, timesteps, condition, 3.0, poor)
    torch.testing.assert_close(found, plain - 2 * 0.25)
    assert [name for name, _ in calls[1:]] == ["good", "poor"] and all(given is condition for _, given in calls)
    calls.clear()
    assert torch.equal(predict(good, x, timesteps, condition, 1.0, poor), plain)
    assert [name for name, _ in calls] == ["good"], "in one pass"
    torch.testing.assert_close(predict(good, x, timesteps, condition, 0.0, poor), plain + 0.25)
    calls.clear()
    guided([], denoiser=good, guide=poor, guidance_scale=2.0, guidance_interval=(0.3, 3.0))
    assert 0 < [name for name, _ in calls].count("poor") < [name for name, _ in calls].count("good")
