"""Ways to tell a network what to draw: each is a network of its own, begins as nothing, and learns what it is told."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.compute.recompute import kept_for_gradients
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.training import loop
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.tasks.diffusion import DiffusionTask

COVARIATES = ("modulation", "addition", "cross_attention", "concatenation")
MAPS = ("concatenation", "spade", "controlnet")


def settings(**told):
    return config.Diffusion(network="conditioned", channels=[8], num_res_blocks=2, covariate_dim=8, conditioning=told)


def made(shown=False, **told):
    torch.manual_seed(0)
    return Denoiser(settings(**told), (4, 6, 6, 6), [0, 3], 5, maps={"labels": 2} if shown else None)


def told(covariates, maps=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shown = {"labels": torch.randn(2, 2, 6, 6, 6, generator=generator)} if maps else {}
    return Condition(torch.tensor(covariates), shown, {}, torch.zeros(2, 5))


def awake(denoiser):
    """Whatever begins at zero does not any more."""
    for parameter in denoiser.network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return denoiser


def output(denoiser, condition, x=None):
    x = torch.randn(2, 4, 6, 6, 6, generator=torch.Generator().manual_seed(1)) if x is None else x
    with torch.no_grad():
        return denoiser(x, torch.tensor([100.0, 700.0]), condition)


@pytest.mark.parametrize("covariates", COVARIATES)
def test_covariates_change_the_output_and_missing_ones_are_something_else(covariates):
    denoiser = awake(made(covariates=covariates))
    usual = output(denoiser, told([[0.3, 1.0], [0.3, 1.0]]))
    for other in ([[1.3, 1.0], [1.3, 1.0]], [[0.3, 2.0], [0.3, 2.0]], [[float("nan"), 1.0], [float("nan"), 1.0]]):
        assert (output(denoiser, told(other)) - usual).abs().max() > 1e-4
    alone = output(denoiser, told([[0.3, 1.0], [9.0, 0.0]]))
    torch.testing.assert_close(alone[0], usual[0])  # of one subject, whoever is beside


@pytest.mark.parametrize("covariates", COVARIATES)
@pytest.mark.parametrize("maps", MAPS)
def test_maps_are_local_and_begin_as_nothing(covariates, maps):
    denoiser = made(True, covariates=covariates, maps=maps)
    condition = told([[0.3, 1.0]] * 2, True)
    fresh = output(denoiser, condition)
    torch.testing.assert_close(fresh, output(denoiser, told([[0.3, 1.0]] * 2, True, seed=5)))
    usual = output(awake(denoiser), condition)
    changed = {"labels": condition.maps["labels"].clone()}
    changed["labels"][:, :, 0, 0, 0] += 3.0
    difference = (output(denoiser, Condition(condition.covariates, changed, {}, condition.variant)) - usual).abs()
    assert difference[:, :, :2, :2, :2].max() > 1e-4


def test_a_control_branch_doubles_the_blocks_and_the_others_do_not():
    size = {maps: sum(p.numel() for p in made(True, maps=maps).network.net.parameters()) for maps in MAPS}
    assert size["controlnet"] > 1.7 * size["concatenation"] and size["spade"] > size["concatenation"]


def test_blocks_of_a_control_branch_are_recomputed_too():
    hidden, maps, embedding = (torch.randn(2, *shape) for shape in ((8, 6, 6, 6), (2, 6, 6, 6), (16,)))
    kept, found = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        changed = settings(maps="controlnet").model_copy(update={"gradient_checkpointing": checkpointing})
        control = awake(Denoiser(changed, (4, 6, 6, 6), [0], maps={"labels": 2})).network.net.control
        kept.append(kept_for_gradients(lambda control=control: sum(a.sum() for a in control(hidden, maps, embedding))))
        sum(added.square().sum() for added in control(hidden, maps, embedding)).backward()
        found.append([parameter.grad for parameter in control.parameters()])
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def data(tmp_path):
    """Latents that show the map, and a level of their own, the same at every place, which is there without a map."""
    rng, path = np.random.default_rng(0), tmp_path / "latents.arrow"
    columns = {"mean": TensorColumn("float16", (2, 6, 6, 6)), "numbers": TensorColumn("float32", (5,))}
    shown = rng.standard_normal((24, 2, 6, 6, 6)).astype(np.float32)
    with ShardWriter(path, columns) as writer:
        for one, level in zip(shown, rng.standard_normal((24, 2, 1, 1, 1)), strict=True):
            writer.append(mean=(one + level) / np.sqrt(2.0), numbers=np.zeros(5, np.float32))

    class Maps:
        channels = 2

        def __call__(self, rows):
            return shown[rows]

    fresh = Denoiser(settings(), (2, 6, 6, 6), [0, 3])
    prior = {name: torch.from_numpy(value) for name, value in fresh.prior().items()}
    covariates = np.stack([rng.standard_normal(24), rng.integers(3, size=24)], 1).astype(np.float32)
    return LatentData(Shards([path]), prior, covariates, np.arange(20), np.arange(20, 24), maps={"labels": Maps()})


class Blank:
    """A map that shows nothing."""

    def __init__(self, maps):
        self.maps, self.channels = maps, maps.channels

    def __call__(self, rows):
        return np.zeros_like(self.maps(rows))


def task_of(data, maps, steps=60, share=0.25):
    optimiser = {
        "steps": steps,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "checkpoint_every": 20,
        "validate_every": steps,
    }
    encoding = CovariateEncoding(
        {
            "age": config.ContinuousCovariate(unit="year", range=(-9, 9)),
            "site": config.CategoricalCovariate(levels=["a", "b", "c"]),
        },
        {"age": 0.0},
        {"age": 1.0},
    )
    chosen = settings(maps=maps, base_share=share).model_copy(
        update={"optimiser": config.DiffusionOptimiser(**optimiser)}
    )
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
    return DiffusionTask(chosen, data, encoding, "seed", fabric), fabric


@pytest.mark.parametrize("maps", MAPS)
def test_what_a_map_shows_is_learnt(data, tmp_path, maps):
    task, fabric = task_of(data, maps, steps=200)  # a ControlNet learns of maps in the second half alone, from zero
    before = task.validate()["val/loss"]
    loop.fit(task, task.settings.optimiser, fabric, tmp_path, "test")
    after = task.validate()["val/loss"]
    task.data = dataclasses.replace(data, maps={"labels": Blank(data.maps["labels"])})
    gain = 0.97 if maps == "controlnet" else 0.9  # whose base stays as it learnt to be without maps
    assert after < 0.9 * before and after < gain * task.validate()["val/loss"]  # without the map it is lost


def test_the_base_of_a_control_branch_is_frozen_and_copied_halfway(data, tmp_path):
    task, fabric = task_of(data, "controlnet", steps=40, share=0.5)
    loop.fit(task, task.settings.optimiser, fabric, tmp_path, "test")
    state = {int(path.stem.split("-")[1]): load_file(path) for path in sorted(tmp_path.glob("step-*.safetensors"))}
    half, end = state[20], state[40]
    base = [name for name in half if "model" in name and ".net." in name and ".control." not in name]
    branch = [name for name in half if "model" in name and ".control." in name]
    assert base and branch
    assert all(torch.equal(half[name], end[name]) for name in base)
    assert any(not torch.equal(half[name], end[name]) for name in branch)


def test_a_controlled_training_resumes_to_the_same_weights(data, tmp_path):
    weights = []
    for folder, kept in (("whole", None), ("parts", 1)):
        for _ in range(1 if kept is None else 2):
            task, fabric = task_of(data, "controlnet", steps=60)
            loop.fit(task, task.settings.optimiser, fabric, tmp_path / folder, "test")
            if kept is not None:
                for late in sorted((tmp_path / folder).glob("step-*.safetensors"))[kept:]:
                    late.unlink()
        weights.append(task.modules["average"].state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_other_networks_have_a_way_of_their_own():
    with pytest.raises(ValueError, match="set network: conditioned"):
        config.Diffusion(conditioning={"covariates": "addition"})
    with pytest.raises(ValueError, match="trained in two parts"):
        config.Diffusion(network="conditioned", conditioning={"maps": "controlnet"}, guide_share=0.5)
    with pytest.raises((UserError, ValueError)):
        config.Diffusion(network="conditioned", conditioning={"maps": "spatial"})
