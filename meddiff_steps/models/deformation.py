"""A network that registers: deformations at several scales, out of the features of a score network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.imaging.deformation import exponential, finer
from meddiff_steps.models.blocks import ChannelNorm, ResidualBlock, convolution, dense, silence
from meddiff_steps.models.weights import load_weights

#: Width of the embedding of the noise level, and features of it.
EMBEDDING, FREQUENCIES = 64, 16


class RegistrationNetwork(nn.Module):
    """The velocity that brings a moving scan onto a fixed one, out of the features of a score network.

    A U-Net on blocks of 2 x 2 x 2 voxels of reduced scans sees both, and the fixed one with noise, and tells the noise:
    the score of the fixed scan.  From its decoder's features at every scale a deformation head makes a velocity
    (FSDiffReg, Qin and Li 2023); they are added up.  Heads have no constants, so that without features nothing moves,
    and features that are scaled down deform less (DiffuseMorph, Kim et al. 2022, section 3.3).

    The plain network is the same without noise, noise level and score.

    Parameters
    ----------
    settings
        The study's `registration` section.
    image_shape
        (1, *spatial).
    score
        Whether it is a score network.

    Raises
    ------
    UserError
        The images are no volumes, or cannot be halved so often.
    """

    def __init__(self, settings: config.PairRegistration, image_shape: Sequence[int], score: bool) -> None:
        super().__init__()
        channels, shape = settings.channels, tuple(image_shape[1:])
        part = settings.reduce * 2 ** len(channels)
        if image_shape[0] != 1 or len(shape) != 3 or any(n % part for n in shape):
            raise UserError(
                f"registration: images of shape {tuple(image_shape)}, expected volumes of one channel whose sides are"
                f" multiples of {part}: registration.reduce is {settings.reduce}, and {len(channels)} channels halve"
                " them so often. Change preprocess.shape, or name fewer channels."
            )
        self.shape, self.factor, self.score = shape, settings.reduce, score
        self.process = NoiseProcess.of(config.Diffusion(prediction_type="epsilon"))
        width = EMBEDDING if score else 0
        self.embedding = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU()) if score else None
        self.first = convolution(3, 24 if score else 16, channels[0])
        self.down = nn.ModuleList(convolution(3, a, b, 2) for a, b in itertools.pairwise(channels))
        self.up = nn.ModuleList(convolution(3, b, a) for a, b in itertools.pairwise(channels))
        self.encoder = nn.ModuleList(ResidualBlock(3, c, width) for c in channels)
        self.decoder = nn.ModuleList(ResidualBlock(3, c, width) for c in channels[:-1])
        self.norms = nn.ModuleList(ChannelNorm(c) for c in channels)
        heads = [nn.Conv3d(c, 3, 3, padding=1, bias=False) for c in channels]
        for head in heads:
            silence(head)  # nothing moves at first
        self.heads = nn.ModuleList(heads)
        self.readout = convolution(3, channels[0], 8) if score else None
        if self.readout is not None:
            silence(self.readout)

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [*self.encoder, *self.decoder, *self.heads]

    def forward(
        self, moving: Tensor, fixed: Tensor, noisy: Tensor | None = None, timesteps: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Velocity and noise; of `features`."""
        found, noise = self.features(moving, fixed, noisy, timesteps)
        return self.velocity(found).float(), None if noise is None else noise.float()

    def features(
        self, moving: Tensor, fixed: Tensor, noisy: Tensor | None = None, timesteps: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Features by scale, the finest (half of the reduced resolution) first, and the noise.

        Parameters
        ----------
        moving, fixed
            (b, 1, *spatial) in [0, 1], reduced.
        noisy, timesteps
            The fixed scan, times 2 less 1, with noise, and (b,) how much; of a score network. None: none.
        """
        seen = [moving * 2.0 - 1.0, fixed * 2.0 - 1.0]
        level = None
        if self.embedding is not None:
            if noisy is None or timesteps is None:
                noisy, timesteps = seen[1], torch.zeros(len(fixed), device=fixed.device)
            seen.append(noisy)
            level = self.embedding(self._features(timesteps))
        h, skipped = self.first(dense(pixelunshuffle(torch.cat(seen, 1), 3, 2))), []
        for i, block in enumerate(self.encoder):
            h = block(dense(self.down[i - 1](h)) if i else h, level)
            skipped.append(h)
        found = [self.norms[-1](h)]
        for i in reversed(range(len(self.decoder))):
            h = skipped[i] + functional.interpolate(self.up[i](dense(h)), scale_factor=2.0, mode="nearest")
            h = self.decoder[i](dense(h), level)
            found.append(self.norms[i](h))
        noise = None
        if self.readout is not None:
            noise = pixelshuffle(self.readout(functional.silu(found[-1])), 3, 2)
        return found[::-1], noise

    def velocity(self, features: Sequence[Tensor], share: float = 1.0) -> Tensor:
        """Of features times `share`; (b, 3, *spatial) at half of the reduced resolution, in its voxels."""
        parts = [head(functional.silu(dense(f) * share)) for head, f in zip(self.heads, features, strict=True)]
        made = parts[-1]
        for part in parts[-2::-1]:
            made = finer(made, part.shape[2:]) + part
        return made

    def reduced(self, images: Tensor) -> Tensor:
        """Block means of images (b, 1, *spatial), as the network sees them."""
        return functional.avg_pool3d(images, self.factor)

    def displacement(self, velocity: Tensor, *, whole: bool) -> Tensor:
        """Of a velocity; (b, 3, *spatial) in voxels of whole or of reduced images."""
        return finer(exponential(velocity), [n if whole else n // self.factor for n in self.shape])

    def _features(self, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha_sigma(timesteps)
        level = ((sigma.log() - alpha.log()) / 4).float()[:, None]
        angles = level * torch.exp(torch.linspace(math.log(0.2), math.log(12.0), FREQUENCIES, device=level.device))
        return torch.cat([angles.sin(), angles.cos()], 1)


def load_registration_network(folder: Path) -> tuple[RegistrationNetwork, dict[str, Any]]:
    """A trained network, in evaluation mode on the CPU, and its card."""
    card = read_json(folder / CARD)
    settings = config.PairRegistration.model_validate(card["settings"])
    model = RegistrationNetwork(settings, card["image_shape"], card["score"])
    load_weights(model, folder, card)
    return model, card
