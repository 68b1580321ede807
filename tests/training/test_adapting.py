"""Trainings that stay near what they start from: adapters, and the pull back to the base."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from test_init_from import given
from test_training import OPTIMISER, TWO_NUMBERS, fabric, images, latents  # noqa: F401 - fixtures
from torch import nn
from torch.nn.utils import parametrize

from meddiff_steps import config
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.trained import DenoiserCard, load_denoiser, save_denoiser
from meddiff_steps.models.weights import weights_digest
from meddiff_steps.training import loop
from meddiff_steps.training.adapting import ADAPTED, LowRank, add_adapters, merged_state
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask

RANK = 2


def diffusion(latents, fabric, network="resnet", **changes):  # noqa: F811
    """A task and the base that it starts from."""
    inputs = [{"covariate": name, "range": [0, 1]} for name in "ab"]
    settings = config.Diffusion(
        **{"network": network, "channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8, "num_res_blocks": 1},
        published={"inputs": inputs},
        **{"optimiser": OPTIMISER.model_dump(), "adapter_rank": RANK, **changes},
    )
    torch.manual_seed(3)
    base = given(DenoiserCard(settings, (4, 4, 4, 4), TWO_NUMBERS, 5).build())
    return DiffusionTask(settings, latents, TWO_NUMBERS, "seed", fabric, base), base


def fitted(task, fabric, folder):  # noqa: F811
    loop.fit(task, task.settings.optimiser, fabric, folder, "test")
    return task


def outputs(denoiser):
    generator = torch.Generator().manual_seed(0)
    x, told = torch.randn(3, 4, 4, 4, 4, generator=generator), torch.randn(3, 2, generator=generator)
    with torch.no_grad():
        return denoiser(x, torch.tensor([5.0, 300.0, 900.0]), Condition(told))


def distance(one, other):
    """Between the weights of two networks of one kind."""
    mine = other.state_dict()
    return sum(float((value - mine[name]).square().sum()) for name, value in one.state_dict().items()) ** 0.5


@pytest.mark.parametrize("network", ["resnet", "unet", "published"])
def test_adapters_learn_and_leave_the_base_as_it_is(latents, fabric, tmp_path, network):  # noqa: F811
    task, base = diffusion(latents, fabric, network, trains="adapters")
    before, digest = task.validate()["val/loss"], weights_digest(base.state_dict())
    torch.testing.assert_close(outputs(task.modules["average"]), outputs(base))  # but for the layout of convolutions
    fitted(task, fabric, tmp_path)
    assert task.validate()["val/loss"] < before
    for name in ("model", "average"):
        found, adapters = {}, 0
        for key, value in task.modules[name].state_dict().items():
            adapters += key.endswith(("0.up", "0.down"))
            if not key.endswith(("0.up", "0.down")):
                found[key.replace("parametrizations.weight.original", "weight")] = value
        assert weights_digest(found) == digest and adapters
    assert weights_digest(base.state_dict()) == digest


def test_every_linear_layer_and_convolution_is_adapted_and_nothing_else_is_trained(latents, fabric):  # noqa: F811
    model = diffusion(latents, fabric, "unet", trains="adapters")[0].modules["model"]
    layers = [each for each in model.network.modules() if isinstance(each, ADAPTED)]
    assert len(layers) > 10 and all(parametrize.is_parametrized(each, "weight") for each in layers)
    trained = {name.rsplit(".", 1)[1] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"up", "down"}


def test_merged_weights_give_the_same_images_and_the_usual_file(latents, fabric, tmp_path):  # noqa: F811
    task, base = diffusion(latents, fabric, trains="adapters")
    fitted(task, fabric, tmp_path / "state")
    adapted, released = task.modules["average"], task.released
    assert torch.equal(outputs(released), outputs(adapted))
    assert not torch.allclose(outputs(released), outputs(base), atol=1e-4)
    save_denoiser(released, task.card, tmp_path, {})
    assert load_file(tmp_path / "model.safetensors").keys() == base.state_dict().keys()
    assert torch.equal(outputs(load_denoiser(tmp_path)[0]), outputs(adapted))
    for name, value in base.network.state_dict().items():
        change = released.network.state_dict()[name] - value
        if value.ndim > 1:
            assert torch.linalg.matrix_rank(change.flatten(1), atol=1e-6, rtol=0.0) <= RANK, name
        else:
            assert not change.any(), name


def test_a_training_of_adapters_resumes_to_the_same_weights(latents, fabric, tmp_path):  # noqa: F811
    whole = fitted(diffusion(latents, fabric, trains="adapters")[0], fabric, tmp_path / "whole").released
    task, _ = diffusion(latents, fabric, trains="adapters")
    fitted(task, fabric, tmp_path / "parts")
    for late in sorted((tmp_path / "parts").glob("step-*.safetensors"))[1:]:
        late.unlink()
    resumed = fitted(diffusion(latents, fabric, trains="adapters")[0], fabric, tmp_path / "parts").released
    assert weights_digest(resumed.state_dict()) == weights_digest(whole.state_dict())


def test_a_rank_beyond_a_matrix_is_that_of_the_matrix():
    layer = nn.Conv3d(3, 5, 1)
    assert LowRank(layer.weight, 8).up.shape == (5, 3)
    plain = copy.deepcopy(layer)
    add_adapters(layer, 8)
    layer.parametrizations.weight[0].up.data.normal_()
    whole, x = nn.Conv3d(3, 5, 1), torch.randn(1, 3, 2, 2, 2)
    whole.load_state_dict(merged_state(layer))
    assert torch.equal(whole(x), layer(x)) and not torch.allclose(whole(x), plain(x))
    assert torch.equal(layer.parametrizations.weight.original, plain.weight)


def test_the_pull_keeps_a_diffusion_model_nearer_to_its_base(latents, fabric, tmp_path):  # noqa: F811
    found = []
    for strength in (0.0, 300.0, 1e9):
        task, base = diffusion(latents, fabric, towards_base=strength)
        found.append(distance(fitted(task, fabric, tmp_path / str(strength)).modules["model"], base))
    assert found[0] > 1.2 * found[1] > 0.0 and found[2] == 0.0


def test_the_pull_holds_what_of_an_autoencoder_is_trained(images, fabric, tmp_path):  # noqa: F811
    found = []
    for strength in (0.0, 300.0):
        settings = config.Autoencoder(
            channels=[8, 16], latent_channels=4, optimiser=OPTIMISER.model_dump(), towards_base=strength
        )
        torch.manual_seed(3)
        base = given(build_first_stage(settings, 3))
        task = AutoencoderTask(settings, config.Variants(), images, range(8), range(8, 10), "seed", fabric, None, base)
        found.append(distance(fitted(task, fabric, tmp_path / str(strength)).modules["model"], base))
    assert found[0] > 1.2 * found[1] > 0.0
