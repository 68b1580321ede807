"""A network that tells points from noise, given others: the same whatever their order and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import silence
from meddiff_steps.models.weights import load_weights

#: Octaves of sines and cosines of coordinates, and of the noise level.
OCTAVES, LEVEL_OCTAVES = 5, 6
#: Features of one head of the attention.
HEAD = 16


def waves(values: Tensor, octaves: int) -> Tensor:
    """Values (..., d) with their sines and cosines at doubling frequencies, (..., d + 2 d octaves)."""
    angles = values[..., None] * 2.0 ** torch.arange(octaves, device=values.device)
    return torch.cat([values, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)


class PointBlock(nn.Module):
    """Noisy points look at each other and at what is left, then each for itself; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD
        self.norm1, self.norm2 = (nn.LayerNorm(channels, elementwise_affine=False) for _ in range(2))
        self.left = nn.LayerNorm(channels)
        self.modulation = nn.Linear(channels, 4 * channels)
        self.query, self.pair = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        last = nn.Linear(4 * channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), last)
        silence(self.modulation)
        silence(self.out)
        silence(last)

    def forward(self, h: Tensor, left: Tensor, level: Tensor) -> Tensor:
        """h (b, n, c), left (b, k, c), level (b, c) -> as h."""
        gain1, shift1, gain2, shift2 = self.modulation(level)[:, None].chunk(4, -1)
        seen = self.norm1(h) * (1 + gain1) + shift1
        query, (key, value) = self.query(seen), self.pair(torch.cat([seen, self.left(left)], 1)).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        h = h + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        made: Tensor = h + self.mlp(self.norm2(h) * (1 + gain2) + shift2)
        return made


class PointDenoiser(nn.Module):
    """Predicts v of points (b, 3, n), given those that are left (`condition.maps["left"]`, (b, 3, k)); standardised.

    A transformer without positions: what it says of a point depends on the set of the others, not on their order (in
    the place of PCDiff's point-voxel convolutions; Friedrich et al. 2023).

    Parameters
    ----------
    settings
        The study's `shape_completion` section.
    """

    middle: Tensor
    scale: Tensor

    def __init__(self, settings: config.ShapeCompletion) -> None:
        super().__init__()
        self.process = NoiseProcess.of(config.Diffusion(prediction_type="v_prediction", schedule="cosine"))
        width, inputs = settings.channels, 3 + 6 * OCTAVES
        self.register_buffer("middle", torch.zeros(3))
        self.register_buffer("scale", torch.ones(()))
        self.of_noisy, self.of_left = nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.level = nn.Sequential(
            nn.Linear(1 + 2 * LEVEL_OCTAVES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.blocks = nn.ModuleList(PointBlock(width) for _ in range(settings.blocks))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 3)
        silence(self.last)

    def standardise(self, points: Tensor) -> Tensor:
        """mm (b, p, 3) to (b, 3, p)."""
        return ((points - self.middle) / self.scale).transpose(1, 2)

    def millimetres(self, points: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return points.transpose(1, 2) * self.scale + self.middle

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        h = self.of_noisy(waves(x.transpose(1, 2).float(), OCTAVES))
        left = self.of_left(waves(condition.maps["left"].transpose(1, 2).float(), OCTAVES))
        alpha, sigma = self.process.alpha_sigma(timesteps)
        level = self.level(waves(torch.atan2(sigma, alpha).float()[:, None], LEVEL_OCTAVES))
        for block in self.blocks:
            h = block(h, left, level)
        return self.last(self.norm(h)).transpose(1, 2)


def told(left: Tensor) -> Condition:
    """The condition of what is left, standardised (b, 3, k)."""
    return Condition(left.new_zeros(len(left), 0), maps={"left": left})


def load_point_denoiser(folder: Path) -> tuple[PointDenoiser, dict[str, Any]]:
    """A trained network, in evaluation mode on the CPU, and its card."""
    card = read_json(folder / CARD)
    model = PointDenoiser(config.ShapeCompletion.model_validate(card["settings"] | {"points": None}))
    load_weights(model, folder, card)
    return model, card
