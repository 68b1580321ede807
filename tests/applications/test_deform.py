"""A network that learnt nothing but one deformation brings a body onto its deformed self."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meddiff_steps.applications.registration import deform, known_deformation
from meddiff_steps.config import PairRegistration
from meddiff_steps.imaging.deformation import moved
from meddiff_steps.models.deformation import RegistrationNetwork

SHAPE = (24, 24, 32)


class Shifting(RegistrationNetwork):
    """Its features are ones, and its velocity is them along the first axis, whatever it sees."""

    def features(self, moving: torch.Tensor, *_: torch.Tensor | None) -> tuple[list[torch.Tensor], None]:
        return [torch.ones(len(moving), 3, *(n // 4 for n in SHAPE))], None

    def velocity(self, features: list[torch.Tensor], share: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        return features[0] * share * torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1, 1)


def test_shares_of_the_way_move_by_their_share() -> None:
    network = Shifting(PairRegistration(channels=[8, 8]), (1, *SHAPE), True)
    image = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
    none, half, whole = deform(network, image, image, (0.0, 0.5, 1.0))
    np.testing.assert_allclose(none.image, image, atol=1e-5)
    for part, voxels in ((half, 2), (whole, 4)):  # a voxel of the velocity is four of the scan
        np.testing.assert_allclose(part.displacement[0], voxels, atol=1e-4)
        assert not part.displacement[1:].any() and part.share == voxels / 4
        np.testing.assert_allclose(part.image[:, :-voxels], image[:, voxels:], atol=1e-3)


def test_a_known_deformation_is_undone_by_what_it_says() -> None:
    away, back = known_deformation(SHAPE, 3.0, np.random.default_rng(3))
    x, y, z = (np.linspace(-1, 1, n) for n in SHAPE)
    body = np.exp(-4 * (x[:, None, None] ** 2 + 2 * y[None, :, None] ** 2 + z[None, None] ** 2)).astype(np.float32)
    image = torch.from_numpy(body)[None, None]
    there = moved(image, torch.from_numpy(away)[None])
    again = moved(there, torch.from_numpy(back)[None])
    assert np.linalg.norm(away, axis=0).max() == pytest.approx(3.0, rel=0.4)
    error, distance = (float((one - image)[..., 3:-3, 3:-3, 3:-3].abs().mean()) for one in (again, there))
    assert error < 0.25 * distance
