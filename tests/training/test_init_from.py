"""Trainings that start from given weights: taken as they are, trained on, and the decoder alone."""

import numpy as np
import pytest
import torch
from test_training import OPTIMISER, TWO_NUMBERS, fabric, images, latents  # noqa: F401 - fixtures

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.trained import DenoiserCard
from meddiff_steps.models.weights import ingredient, weights_digest
from meddiff_steps.training import loop
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask


def given(network):
    """A trained network: no weight is where it began."""
    torch.manual_seed(7)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.requires_grad_(False).eval()


def autoencoder(images, fabric, steps, trains="all", network="kl"):  # noqa: F811
    optimiser = OPTIMISER.model_dump() | {"steps": steps}
    settings = config.Autoencoder(
        network=network, channels=[8, 16], norm_num_groups=4, latent_channels=4, optimiser=optimiser, trains=trains
    )
    base = given(build_first_stage(settings, 3))
    task = AutoencoderTask(settings, config.Variants(), images, range(8), range(8, 10), "seed", fabric, None, base)
    return task, base


def trained(task, fabric, folder):  # noqa: F811
    curve = loop.fit(task, task.settings.optimiser, fabric, folder, "test")
    return task.modules["average"], curve


def test_no_steps_take_the_weights_as_they_are(images, fabric, tmp_path):  # noqa: F811
    task, base = autoencoder(images, fabric, 0)
    average, curve = trained(task, fabric, tmp_path)
    assert weights_digest(average.state_dict()) == weights_digest(base.state_dict())
    assert set(curve["metric"]) == {"val/l1", "val/psnr"} and (curve["step"] == 0).all()


@pytest.mark.parametrize("network", ["kl", "resnet"])
def test_a_decoder_that_is_trained_alone_leaves_latents_what_they_are(images, fabric, tmp_path, network):  # noqa: F811
    task, base = autoencoder(images, fabric, 7, "decoder", network)
    average, _ = trained(task, fabric, tmp_path)
    x = torch.from_numpy(images.tensors("image", [0, 1]).astype(np.float32))
    # Weights lie otherwise in memory than the base's, so that processors without bfloat16 add up in another order.
    torch.testing.assert_close(average.encode(x).mode(), base.encode(x).mode(), rtol=1e-5, atol=1e-5)
    changed = [name for name, value in average.state_dict().items() if not torch.equal(value, base.state_dict()[name])]
    assert changed and not [name for name in changed if "encoder" in name or "quant_conv_mu" in name]
    z = torch.randn(1, 4, 2, 2, 2)
    assert not torch.allclose(average.decode(z), base.decode(z), atol=1e-4)


@pytest.mark.parametrize("network", ["resnet", "published"])
def test_a_diffusion_model_goes_on_from_its_base(latents, fabric, tmp_path, network):  # noqa: F811
    inputs = [{"covariate": name, "range": [0, 1]} for name in "ab"]
    settings = config.Diffusion(
        **{"network": network, "channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8, "num_res_blocks": 1},
        published={"inputs": inputs},
        guide_share=0.5,
        optimiser=OPTIMISER.model_dump(),
    )
    base = given(DenoiserCard(settings, (4, 4, 4, 4), TWO_NUMBERS, 5).build())
    task = DiffusionTask(settings, latents, TWO_NUMBERS, "seed", fabric, base)
    assert weights_digest(task.modules["average"].state_dict()) == weights_digest(base.state_dict())
    before = task.validate()["val/loss"]
    average, curve = trained(task, fabric, tmp_path)
    losses = curve[curve["metric"] == "val/loss"]["value"]
    assert losses.iloc[0] == before and losses.iloc[-1] < before
    if network == "published":  # what is told where nothing is known is learnt, too
        assert not torch.equal(average.network.missing, base.network.missing)
    assert torch.equal(average.offset, base.offset) and torch.equal(average.scale, base.scale)


def test_a_base_of_another_size_is_refused(images, fabric):  # noqa: F811
    task, _ = autoencoder(images, fabric, 0)
    wider = task.settings.model_copy(update={"channels": [8, 24]})
    with pytest.raises(UserError, match="autoencoder: the weights to start from are of another network.*read_bundle"):
        AutoencoderTask(
            *(task.settings, config.Variants(), images, range(8), range(8, 10), "seed", fabric, None),
            build_first_stage(wider, 3),
        )


def test_a_card_names_its_base_and_what_that_came_from():
    assert ingredient(None) == {}
    card = {"weights_sha256": "b", "base": {"kind": "model release", "weights_sha256": "a", "license": "L"}}
    said = {"kind": "model release", "license": "L", "source_sha256": "a", "weights_sha256": "b"}
    assert ingredient(card) == {"base": said}
