"""One scan brought onto another by a network that was trained on pairs: the whole way, and parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meddiff_steps.imaging.deformation import exponential, finer, moved, smooth_velocity
from meddiff_steps.models.deformation import RegistrationNetwork

ENTRY = {
    "order": 7,
    "summary": "A scan brought onto another, wholly or in part",
    "source": "Kim et al. 2022 (DiffuseMorph); Qin and Li 2023 (FSDiffReg)",
    "needs": ["scans of several people", "label maps, to judge it"],
}

#: The Gaussian of known velocities, as a share of the longest side, and how much coarser than scans they are drawn.
SMOOTH, COARSER = 0.12, 2


@dataclass(frozen=True)
class Deformed:
    """A share of the way of one scan onto another.

    Attributes
    ----------
    share
        0: nothing moved, 1: the whole deformation.
    image
        The moved scan, float32 (1, *spatial) in [0, 1].
    displacement
        Voxels, float32 (3, *spatial): the moved scan has at x what the moving one has at x + u(x).
    """

    share: float
    image: np.ndarray
    displacement: np.ndarray


@torch.no_grad()
def deform(
    network: RegistrationNetwork, moving: np.ndarray, fixed: np.ndarray, shares: Sequence[float] = (1.0,)
) -> list[Deformed]:
    """The moving scan on its way onto the fixed one, by `shares` of the features of the whole deformation.

    The network sees the fixed scan without noise (DiffuseMorph, Kim et al. 2022, section 3.3).

    Parameters
    ----------
    moving, fixed
        Preprocessed scans, float32 (1, *spatial) in [0, 1].
    """
    device = next(network.parameters()).device
    images = [torch.from_numpy(np.ascontiguousarray(image))[None].to(device) for image in (moving, fixed)]
    features, _ = network.features(*(network.reduced(image) for image in images))
    found = []
    for share in shares:
        displacement = network.displacement(network.velocity(features, share), whole=True)
        image = moved(images[0], displacement)
        found.append(Deformed(share, image[0].cpu().numpy(), displacement[0].cpu().numpy()))
    return found


def known_deformation(
    shape: Sequence[int], largest: float, generator: np.random.Generator, smooth: float = SMOOTH
) -> tuple[np.ndarray, np.ndarray]:
    """A random smooth displacement and the one that undoes it, float32 (3, *shape) each, in voxels.

    They are exp(-v) and exp(v) of a velocity whose longest vector has `largest` voxels; it is white noise after a
    Gaussian of `smooth` times the longest side.
    """
    coarse = [n // COARSER for n in shape]
    drawn = smooth_velocity(coarse, largest / COARSER, smooth * max(coarse), generator)
    velocity = torch.from_numpy(drawn)[None]
    away, back = (finer(exponential(v), shape)[0].numpy() for v in (-velocity, velocity))
    return away, back
