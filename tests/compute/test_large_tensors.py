"""Batches whose tensors a GPU's convolutions can count with 32 bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meddiff_steps import config
from meddiff_steps.compute import large_tensors
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.first_stage.base import build


class Largest(TorchDispatchMode):
    """Looks at every tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        several = made if isinstance(made, (list, tuple)) else [made]
        self.numbers = max([self.numbers, *(one.numel() for one in several if isinstance(one, torch.Tensor))])
        return made


PUBLISHED = {"network": "kl", "stem": "none", "channels": [64, 128, 128, 128], "norm_num_groups": 32}
FIRST_STAGES = [
    PUBLISHED | {"latent_channels": 3},
    PUBLISHED | {"channels": [16, 64, 64], "norm_num_groups": 16, "latent_channels": 3},
    {"network": "resnet", "stem": "haar", "channels": [64, 128, 128], "latent_channels": 8},
    {"network": "resnet", "stem": "none", "channels": [32, 16], "latent_channels": 4},
    {"network": "resnet", "stem": "haar", "channels": [16, 512], "latent_channels": 4},
]


def named(settings):
    return f"{settings['network']}-{settings['stem']}"


@pytest.mark.parametrize("settings", FIRST_STAGES, ids=named)
@pytest.mark.parametrize("shape", [(160, 224, 160), (64, 96)])
def test_the_largest_tensor_of_a_first_stage_is_known(settings, shape):
    settings = config.Autoencoder.model_validate(settings)
    with torch.device("meta"):
        stage = build(settings, len(shape))
        image = torch.empty(1, 1, *shape)
        latents = stage.encode(image).mode()
        with torch.no_grad(), Largest() as seen:
            stage.encode(image)
            stage.decode(latents)
    finest = image.numel() / (1 if settings.stem == "none" else 2 ** len(shape))
    # What convolutions make and are given; sums and normalisations in between are no larger.
    assert seen.numbers == stage.widest * finest


def test_no_tensor_of_a_batch_of_the_published_network_is_too_large():
    """Eight scans at 1 mm at once, or the four of a training step, would make 1.4 times as many numbers as 32 bits
    count.
    """
    with torch.device("meta"):
        stage = build(config.Autoencoder.model_validate(FIRST_STAGES[0]), 3)
        images = torch.empty(8, 1, 160, 224, 160)
        latents = stage.encode(images[:1]).mode().expand(4, -1, -1, -1, -1)
        with torch.no_grad(), Largest() as seen:
            assert len(stage.encode(images).mode()) == 8 and len(stage.decode(latents)) == 4
    assert 2**30 < seen.numbers <= large_tensors.MOST


@pytest.mark.parametrize(
    "settings", FIRST_STAGES[1:4], ids=lambda settings: f"{settings['network']}-{settings['stem']}"
)
def test_parts_give_what_the_whole_gives_and_learn_the_same(settings, monkeypatch):
    torch.manual_seed(0)
    stage = build(config.Autoencoder.model_validate(settings), 3)
    images = torch.rand(5, 1, 16, 16, 16)

    def learn():
        stage.zero_grad()
        posterior = stage.encode(images)
        decoded = stage.decode(posterior.mode())
        (decoded - images).square().mean().backward()
        return decoded, {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}

    whole, gradients = learn()
    calls = []
    for part in stage.costly.values():
        part.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    monkeypatch.setattr(large_tensors, "MOST", int(2.5 * stage.widest * 16**3 / (1 if stage.stem.factor == 1 else 8)))
    parts, same = learn()
    assert calls == [2, 2, 1] * 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-5)


def test_an_image_that_is_too_large_for_a_gpu_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr(large_tensors, "MOST", 100)
    x = torch.zeros(3, 1, 4, 4)
    assert len(large_tensors.in_parts(lambda part: part, x, 1000.0)) == 3  # a processor counts with 64 bits

    class OnGpu:
        is_cuda, shape = True, x.shape

        def __len__(self):
            return 3

    with pytest.raises(UserError, match=r"makes a tensor of 1,000 numbers .* autoencoder\.stem: haar"):
        large_tensors.in_parts(lambda part: part, OnGpu(), 1000.0)
