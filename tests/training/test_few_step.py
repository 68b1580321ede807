"""Students of progressive distillation and of consistency distillation."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.levels import halving_timesteps
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.resnet import ResNet
from meddiff_steps.models.denoiser.student import Distilled, check_sampler
from meddiff_steps.models.trained import DenoiserCard
from meddiff_steps.models.weights import weights_digest
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.tasks import few_step
from meddiff_steps.training.tasks.few_step import BatchLevels, ConsistencyTask, ProgressiveTask, Teacher, distil

sys.path.append(str(Path(__file__).parents[1] / "diffusion"))
from oracle import standard_normal

SHAPE = (2, 4, 4)
TYPES = ("epsilon", "v_prediction", "flow")
ONE_NUMBER = CovariateEncoding({"a": config.ContinuousCovariate(unit="", range=(-9, 9))}, {"a": 0}, {"a": 1})
EXACT = config.Compute(device="cpu", precision="32-true")
PLAIN = Distilled("progressive", 1, "classifier_free", 1.0, None)


@pytest.fixture(scope="module")
def fabric():
    return make_fabric(EXACT, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> LatentData:
    """Numbers of deviation 0.5 about their subject's covariate, -1 or 1."""
    path, rng = tmp_path_factory.mktemp("latents") / "shard.arrow", np.random.default_rng(0)
    covariates = np.tile([[-1.0], [1.0]], (150, 1)).astype(np.float32)
    with ShardWriter(path, {"scan_id": pa.string(), "mean": TensorColumn("float16", SHAPE)}) as shard:
        for i, (shift,) in enumerate(covariates):
            shard.append(scan_id=str(i), mean=shift + 0.5 * rng.normal(size=SHAPE))
    prior = {"offset": torch.zeros(1, *SHAPE), "scale": torch.tensor(1.0)}
    return LatentData(Shards([path]), prior, covariates, np.arange(260), np.arange(260, 300))


def card_of(prediction_type: str = "v_prediction", **settings: Any) -> DenoiserCard:
    settings = {"channels": [16], "num_res_blocks": 1, "prediction_type": prediction_type} | settings
    return DenoiserCard(config.Diffusion(**settings), SHAPE, ONE_NUMBER, 0)


class ExactNetwork(ResNet):
    """Knows the distribution of `data`: gives what its posterior mean of x0 is more than that of white latents of
    deviation 1 and mean 0, in posterior deviations of these.
    """

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (a.float().reshape(-1, *[1] * (x.ndim - 1)) for a in self.process.alpha_sigma(timesteps))
        power = alpha.square() + sigma.square()
        x = power.sqrt() * x
        shift = condition.covariates[:, 0].nan_to_num().reshape(alpha.shape)
        clean = shift + alpha * 0.25 / (alpha.square() * 0.25 + sigma.square()) * (x - alpha * shift)
        return (clean - alpha / power * x) * power.sqrt() / sigma


def exact(prediction_type: str = "v_prediction") -> tuple[Denoiser, DenoiserCard]:
    """A teacher that has learnt all there is."""
    card = card_of(prediction_type, condition_dropout=0.0, covariate_dropout=0.0)
    torch.manual_seed(0)
    teacher = card.build()
    teacher.network.__class__ = ExactNetwork
    return teacher.requires_grad_(False).eval(), card


def random_denoiser(card: DenoiserCard) -> Denoiser:
    """Not trained, but no zero function either."""
    torch.manual_seed(1)
    denoiser = card.build()
    denoiser.effects.effects.normal_(0, 0.2)
    denoiser.effects.deviation.fill_(0.8)
    readout = torch.linalg.qr(torch.randn(math.prod(SHAPE), len(denoiser.effects.readout)))[0].T
    denoiser.effects.readout.copy_(readout.reshape(-1, *SHAPE))
    denoiser.effects.readout_deviations.uniform_(0.3, 0.6)
    for parameter in denoiser.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return denoiser.requires_grad_(False).eval()


def settings_of(method: str, teacher_steps: int = 8, steps: int = 60, student_steps: int = 1) -> config.FewStep:
    optimiser = {"steps": steps, "batch_size": 32, "learning_rate": 5e-3, "checkpoint_every": 7, "log_every": 20}
    return config.FewStep(
        method=method,
        num_inference_steps=student_steps,
        teacher_steps=teacher_steps,
        optimiser=optimiser | {"warmup_steps": 5, "validate_every": 1000},
    )


def drawn(denoiser: Denoiser, sampler: str, steps: int, n: int = 512) -> Tensor:
    """(n, *SHAPE) from a model, for covariates -1 and 1 in turn."""
    rng = torch.Generator().manual_seed(3)
    condition = Condition(torch.tensor([[-1.0], [1.0]]).repeat(n // 2, 1))
    noises = torch.randn(steps + 1, n, *SHAPE, generator=rng)
    with torch.no_grad():
        return sample(
            denoiser,
            noises[0],
            condition,
            denoiser.process,
            sampler,
            num_inference_steps=steps,
            step_noise=lambda i: noises[i + 1],
        )


# ------------------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("prediction_type", TYPES)
def test_levels_of_half_as_many_steps_are_every_second_one(prediction_type):
    process = NoiseProcess.of(config.Diffusion(prediction_type=prediction_type))
    fine = halving_timesteps(process, 16)
    assert (np.diff(fine) < 0).all() and len(fine) == 16
    for steps in (8, 4, 2, 1):
        assert np.array_equal(halving_timesteps(process, steps), fine[:: 16 // steps])
    alpha, sigma = process.alpha_sigma(torch.from_numpy(fine[1:]))
    expected = math.pi / 2 * (1 - np.arange(1, 16) / 16)
    np.testing.assert_allclose(torch.atan2(sigma, alpha), expected, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_clean_of_is_the_way_back_of_towards(fabric, prediction_type):
    levels = BatchLevels(NoiseProcess.of(config.Diffusion(prediction_type=prediction_type)), 8, fabric)
    x, clean, level = torch.randn(8, *SHAPE), torch.randn(8, *SHAPE), torch.arange(8)
    there = levels.towards(level, x, clean)
    torch.testing.assert_close(levels.clean_of(level, x, there), clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there[-1], clean[-1])  # the last step ends with clean latents


# ------------------------------------------------------------------------------------------------ closed form


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_that_has_learnt_nothing_draws_the_gaussian_that_is_known(prediction_type, steps):
    card = replace(card_of(prediction_type), few_step=replace(PLAIN, num_inference_steps=steps))
    student = card.build()
    random = random_denoiser(card_of(prediction_type)).effects.state_dict()
    student.effects.load_state_dict(random)
    noise = standard_normal(2 * math.prod(SHAPE) * 64).reshape(-1, *SHAPE)
    condition = Condition(torch.full((len(noise), 1), 0.7))
    with torch.no_grad():
        x = sample(student, noise, condition, student.process, "progressive", num_inference_steps=steps)
    mean, _ = student.effects.features_given(condition.covariates[:1])
    expected = (mean @ student.effects.effects.flatten(1)).reshape(SHAPE)
    rest, start = (x - expected).flatten(1), noise.flatten(1)
    rows = student.effects.readout.flatten(1)
    along, from_along = rest @ rows.T, start @ rows.T
    # Up to what the noisiest level still shows of the image.
    tolerance = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(along, from_along * student.effects.readout_deviations, **tolerance)
    outside, from_outside = rest - along @ rows, start - from_along @ rows
    torch.testing.assert_close(outside, 0.8 * from_outside, **tolerance)


def test_every_level_of_the_most_steps_leads_to_the_next():
    """Also those that lie nearer to a neighbour than to their angle, as the process has no more, or no less, noise."""
    denoiser = random_denoiser(card_of())
    timesteps = torch.from_numpy(halving_timesteps(denoiser.process, 64))
    x, covariates = standard_normal(64 * math.prod(SHAPE)).reshape(64, *SHAPE), torch.full((64, 1), 0.7)
    angle = math.pi / 2 * (1.0 - torch.arange(1, 65).double() / 64)
    alpha_sigma = denoiser.process.alpha_sigma(timesteps.float())
    expected = denoiser.effects.path(x, *alpha_sigma, angle.cos(), angle.sin(), covariates)
    found = denoiser.taking(64).known(x, timesteps.float(), Condition(covariates)).clean
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("known", [0.7, float("nan")])
def test_what_is_not_known_of_a_subject_varies(known):
    """In one step, too: a student draws all of the prior of those whose covariate is missing."""
    denoiser = random_denoiser(card_of()).taking(1)
    denoiser.network.net.last.weight.zero_()
    denoiser.network.net.last.bias.zero_()
    noise = torch.eye(math.prod(SHAPE)).reshape(-1, *SHAPE)
    noise = torch.cat([torch.zeros(1, *SHAPE), noise])
    condition = Condition(torch.full((len(noise), 1), known))
    with torch.no_grad():
        x = sample(denoiser, noise, condition, denoiser.process, "progressive", num_inference_steps=1).flatten(1)
    drawn = (x[1:] - x[0]).T  # a linear map of the noise
    effects, rows = denoiser.effects.effects.flatten(1), denoiser.effects.readout.flatten(1)
    _, covariance = denoiser.effects.features_given(condition.covariates[:1])
    expected = 0.64 * torch.eye(len(drawn)) + effects.T @ covariance[0] @ effects
    expected += rows.T @ torch.diag(denoiser.effects.readout_deviations.square() - 0.64) @ rows
    torch.testing.assert_close(drawn @ drawn.T, expected, rtol=0.03, atol=0.03)
    assert (float(expected.trace()) > 21.0) == math.isnan(known)


def test_of_many_steps_a_student_is_the_denoiser_that_it_was(fabric):
    """The path of a short step begins in the direction of the posterior mean."""
    card = card_of()
    teacher = random_denoiser(card)
    levels = BatchLevels(teacher.process, 32, fabric)
    x, condition = torch.randn(31, *SHAPE), Condition(torch.zeros(31, 1))
    timesteps = levels.timesteps[:31].float()
    gaps = []
    for steps in (4, 32):
        other = teacher.taking(steps)(x, timesteps, condition)
        gaps.append((other - teacher(x, timesteps, condition)).abs().mean())
    assert gaps[1] < 0.25 * gaps[0]


# ---------------------------------------------------------------------------------------------------- targets


def a_task(kind, card, teacher, data, fabric, guidance=None, levels=4):
    own = replace(card, few_step=replace(PLAIN, num_inference_steps=levels if kind is ProgressiveTask else 1))
    judge = Teacher(teacher, guidance, fabric)
    method = "progressive" if kind is ProgressiveTask else "consistency"
    settings = settings_of(method, teacher_steps=2 * levels)
    return kind(settings, own, teacher, judge, levels, data, "seed", fabric)


@pytest.mark.parametrize("interval", [None, (0.3, 2.0)])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_one_step_to_the_target_is_two_guided_steps_of_the_teacher(data, fabric, prediction_type, interval):
    card = card_of(prediction_type)
    teacher = random_denoiser(card)
    guidance = Distilled("progressive", 4, "classifier_free", 1.5, interval)
    task = a_task(ProgressiveTask, card, teacher, data, fabric, guidance)
    grid = [*task.levels.timesteps.tolist(), None]
    condition = Condition(torch.tensor([[0.3], [float("nan")], [-1.2]]))
    for level in range(4):
        x, at = torch.randn(3, *SHAPE), torch.full((3,), level)
        two = sample(
            *(teacher, x, condition, teacher.process, "progressive"),
            num_inference_steps=8,
            start=grid[level],
            stop=grid[level + 1],
            guidance_scale=1.5,
            guidance_interval=interval,
        )
        one = task.levels.towards(at, x, task.target(x, at, condition))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_autoguidance_is_that_of_sampling(data, fabric):
    card = card_of(guide_share=0.5)
    teacher = random_denoiser(card)
    teacher.guide.load_state_dict({k: 0.5 * v for k, v in teacher.network.state_dict().items()})
    task = a_task(ProgressiveTask, card, teacher, data, fabric, Distilled("progressive", 4, "autoguidance", 2.0, None))
    x, condition, at = torch.randn(3, *SHAPE), Condition(torch.tensor([[0.3], [0.1], [-1.2]])), torch.full((3,), 1)
    grid = task.levels.timesteps.tolist()
    two = sample(
        *(teacher, x, condition, teacher.process, "progressive"),
        num_inference_steps=8,
        start=grid[1],
        stop=grid[2],
        guidance_scale=2.0,
        guide=lambda x, t, c: teacher(x, t, c, guide=True),
    )
    torch.testing.assert_close(task.levels.towards(at, x, task.target(x, at, condition)), two, rtol=1e-5, atol=1e-5)


def test_neighbours_on_a_path_have_one_target_and_the_last_is_clean(data, fabric):
    """Judged by a student that knows the way, they are where the way ends."""
    card = card_of()
    teacher = card.build().requires_grad_(False).eval()
    teacher.effects.deviation.fill_(0.5)  # with it the closed form of both is the exact way
    task = a_task(ConsistencyTask, card, teacher, data, fabric, levels=32)
    x, condition = torch.randn(32, *SHAPE), Condition(torch.zeros(32, 1))
    level = torch.arange(32)
    end = task.held_out_target(x, level, condition)
    alpha, sigma = (a[:-1].float().reshape(-1, 1, 1, 1) for a in (task.levels.alpha, task.levels.sigma))
    solved = 0.5 * x / ((0.5 * alpha) ** 2 + sigma**2).sqrt()  # the exact path of a Gaussian
    torch.testing.assert_close(end, solved, rtol=0.03, atol=0.03)
    torch.testing.assert_close(task.target(x, level, condition), solved, rtol=0.03, atol=0.03)
    there = task.levels.towards(level, x, task.teacher.clean(x, task.levels.timesteps, condition))
    torch.testing.assert_close(task.target(x, level, condition)[-1], there[-1])


@pytest.mark.parametrize("prediction_type", TYPES)
def test_an_error_of_one_posterior_deviation_counts_one_at_every_level(data, fabric, prediction_type):
    """So no level is lost, not even pure noise, where the weight of the noise's error would vanish."""
    card = card_of(prediction_type)
    teacher = random_denoiser(card)
    task = a_task(ProgressiveTask, card, teacher, data, fabric)
    x, level, condition = torch.randn(4, *SHAPE), torch.arange(4), Condition(torch.zeros(4, 1))
    timesteps = task.levels.timesteps
    clean = task.teacher.process.to_x0(task.average(x, timesteps.float(), condition), x, timesteps)
    alpha, sigma = (a[:4].float().reshape(-1, 1, 1, 1) for a in (task.levels.alpha, task.levels.sigma))
    deviation = 0.8 * sigma / ((0.8 * alpha) ** 2 + sigma**2).sqrt()
    errors = task._errors(task.average, x, level, condition, clean + deviation)
    torch.testing.assert_close(errors, torch.ones(4), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("method", "prediction_type"), [("progressive", "flow"), ("consistency", "v_prediction")])
def test_in_one_step_a_student_draws_what_its_teacher_draws_in_many(tmp_path, data, fabric, method, prediction_type):
    teacher = exact(prediction_type)
    settings = settings_of(method, teacher_steps=8, steps=150)
    distilled = Distilled(method, 1, "classifier_free", 1.0, None)
    task, curve, _ = distil(settings, distilled, teacher, data, "seed", fabric, EXACT, tmp_path)
    before, student = replace(teacher[1], few_step=distilled).build(), task.average
    many = drawn(teacher[0].taking(settings.teacher_steps), "progressive", settings.teacher_steps)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        for steps in (1, 2, 4) if method == "consistency" else (1,):
            x = drawn(student, method, steps)[rows]
            assert float(x.mean()) == pytest.approx(float(many[rows].mean()), abs=0.1)
            assert float(x.std()) == pytest.approx(float(many[rows].std()), rel=0.2)
        untaught = drawn(before, method, 1)[rows]
        assert abs(float(untaught.mean())) < 0.1 and float(untaught.std()) > 0.9
    held_out = curve[curve["metric"] == "val/loss"]
    assert held_out["value"].iloc[-1] < 0.1 * held_out["value"].iloc[0]
    assert curve["step"].max() == 3 * 150 and task.card.few_step == distilled


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_killed_and_resumed_distillation_gives_the_same_weights_and_curve(
    tmp_path, data, fabric, method, monkeypatch
):
    teacher, settings = exact(), settings_of(method, teacher_steps=4, steps=10)
    distilled = Distilled(method, 1, "classifier_free", 1.5, None)

    def run(folder: str):
        return distil(settings, distilled, teacher, data, "seed", fabric, EXACT, tmp_path / folder)

    straight, curve, _ = run("straight")
    train_step, taken = few_step.FewStepTask.train_step, []

    def killed(self, step):
        taken.append(step)
        if len(taken) == (19 if method == "progressive" else 9):
            raise KeyboardInterrupt
        return train_step(self, step)

    monkeypatch.setattr(few_step.FewStepTask, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    resumed, again, _ = run("killed")
    assert len(taken) == 22  # two trainings of 10 steps, of which two were taken twice
    assert again.equals(curve)
    assert weights_digest(resumed.average.state_dict()) == weights_digest(straight.average.state_dict())


def test_a_teacher_that_is_a_student_is_refused(tmp_path, data, fabric):
    card = replace(card_of(), few_step=PLAIN)
    with pytest.raises(UserError, match="is a student itself"):
        distil(settings_of("progressive"), PLAIN, (card.build(), card), data, "seed", fabric, EXACT, tmp_path)


# ----------------------------------------------------------------------------------------- what it may be used for


@pytest.mark.parametrize(
    ("distilled", "asked", "message"),
    [
        (None, {"sampler": "progressive"}, "this model is none"),
        (PLAIN, {"sampler": "dpmpp"}, "found dpmpp, but this student was distilled for progressive"),
        (PLAIN, {"sampler": "progressive", "num_inference_steps": 4}, "found 4, but this student was distilled for 1"),
        (PLAIN, {"sampler": "progressive", "guidance_scale": 2.0}, "found 2.0, but this student was distilled for 1.0"),
    ],
)
def test_who_draws_with_what_is_checked(distilled, asked, message):
    with pytest.raises(UserError, match=message):
        check_sampler(distilled, config.Generate(**asked))
    check_sampler(PLAIN, config.Generate(sampler="progressive"))
    check_sampler(replace(PLAIN, method="consistency"), config.Generate(sampler="consistency", num_inference_steps=2))
