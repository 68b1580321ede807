"""The registration network: what moves nothing, what it is told, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meddiff_steps.config import PairRegistration
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.deformation import RegistrationNetwork, load_registration_network
from meddiff_steps.models.weights import save_model

SHAPE = (1, 16, 16, 24)
SETTINGS = PairRegistration(channels=[8, 8], reduce=2)


def made(score: bool = True) -> RegistrationNetwork:
    torch.manual_seed(0)
    network = RegistrationNetwork(SETTINGS, SHAPE, score).eval()
    for head in network.heads:
        torch.nn.init.normal_(head.weight, std=0.1)
    return network


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 1, 8, 8, 12, generator=generator), torch.rand(2, 1, 8, 8, 12, generator=generator)


@pytest.mark.parametrize("score", [True, False])
@torch.no_grad()
def test_an_untrained_network_and_no_share_move_nothing(score: bool) -> None:
    fresh = RegistrationNetwork(SETTINGS, SHAPE, score)
    velocity, noise = fresh(*pair())
    assert velocity.shape == (2, 3, 4, 4, 6) and not velocity.any() and (noise is not None) == score
    network = made(score)
    features, _ = network.features(*pair())
    assert not network.velocity(features, 0.0).any(), "exactly, though the features are far from 0"
    sizes = [float(network.velocity(features, share).norm()) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sizes == sorted(sizes) and sizes[-1] > 0.1
    torch.testing.assert_close(network.velocity(features), network(*pair())[0])


@torch.no_grad()
def test_displacements_are_those_of_whole_and_of_reduced_scans() -> None:
    network = made()
    velocity, _ = network(*pair())
    whole, reduced = (network.displacement(velocity, whole=whole) for whole in (True, False))
    assert whole.shape == (2, 3, *SHAPE[1:]) and reduced.shape == (2, 3, 8, 8, 12)
    torch.testing.assert_close(
        torch.nn.functional.avg_pool3d(whole, 2)[..., 2:-2, 2:-2, 2:-2] / 2,
        reduced[..., 2:-2, 2:-2, 2:-2],
        atol=0.02,
        rtol=0,
    )
    images = torch.rand(1, *SHAPE)
    torch.testing.assert_close(network.reduced(images)[0, 0, 1, 2, 3], images[0, 0, 2:4, 4:6, 6:8].mean())


@torch.no_grad()
def test_a_score_network_hears_the_noise_and_a_plain_one_cannot() -> None:
    network, (moving, fixed) = made(), pair()
    clean, _ = network(moving, fixed)
    noisy = network.process.add_noise(fixed * 2 - 1, torch.randn(fixed.shape), torch.full((2,), 500.0))
    told, _ = network(moving, fixed, noisy, torch.full((2,), 500.0))
    assert (clean - told).abs().max() > 1e-4
    plain = made(score=False)
    assert plain.embedding is None and plain.readout is None
    more = sum(p.numel() for p in network.parameters()) / sum(p.numel() for p in plain.parameters())
    assert more < 1.5  # of so few channels; of those of a study, less than 1.05 (below)
    usual = [
        sum(p.numel() for p in RegistrationNetwork(PairRegistration(), (1, 80, 96, 80), s).parameters())
        for s in (True, False)
    ]
    assert 1.0 < usual[0] / usual[1] < 1.05


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    network = made()
    card = {"settings": SETTINGS.model_dump(mode="json"), "image_shape": SHAPE, "score": True}
    save_model(network, tmp_path, card)
    found, card = load_registration_network(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(*pair())[0], network(*pair())[0], atol=0, rtol=0)
    assert card["score"] and not found.training


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 16, 20, 24), (2, 16, 16, 24)])
def test_images_that_cannot_be_halved_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="expected volumes of one channel whose sides are multiples of 8"):
        RegistrationNetwork(SETTINGS, shape, True)
