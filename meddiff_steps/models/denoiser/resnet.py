"""A light residual network at the resolution of the latents: what learns fastest on a processor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import ChannelNorm, ResidualBlock, convolution, coordinates, dense, silence
from meddiff_steps.models.denoiser.effects import covariate_features, feature_count
from meddiff_steps.models.denoiser.new_level import NewLevel, inserted
from meddiff_steps.models.denoiser.tokens import AttendedTokens, CrossAttention

ENTRY = {
    "order": 1,
    "summary": "residual blocks at the latents' resolution, with coordinates; learns fastest on small cohorts",
    "source": "He et al. 2016; Perez et al. 2018; Karras et al. 2022",
    "conditions": ["covariates", "maps", "tokens"],
    "cost": "grows with the voxels of the latents",
    "grows": True,
}

#: Frequencies of the features of a noise level, in radians per unit of ln(sigma / alpha) / 4.
FREQUENCIES, LOWEST, HIGHEST = 32, 0.2, 12.0

#: Bounds of ln(sigma / alpha), which is infinite at the ends of a flow.
LEVELS = (-8.0, 8.0)


class ResidualTrunk(nn.Module):
    """What networks of residual blocks at one resolution share: an embedding of the noise level and of numbers, the
    blocks, and an end that starts at zero.

    Parameters
    ----------
    spatial_dims, inputs, numbers, width, blocks
        As of `LocalNetwork`.
    """

    frequencies: Tensor

    def __init__(self, spatial_dims: int, inputs: int, numbers: int, width: int, blocks: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(LOWEST), math.log(HIGHEST), FREQUENCIES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        embedding = 2 * width
        self.embed = nn.Sequential(
            nn.Linear(2 * FREQUENCIES + numbers, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.first = convolution(spatial_dims, inputs + spatial_dims, width)
        self.blocks = nn.ModuleList(ResidualBlock(spatial_dims, width, embedding) for _ in range(blocks))

    def add_end(self, spatial_dims: int, width: int, outputs: int) -> None:
        """The last layers, made after all others, so that these start from the same numbers whatever is beside them."""
        self.norm, self.last = ChannelNorm(width), convolution(spatial_dims, width, outputs)
        silence(self.last)

    def embedding(self, log_ratio: Tensor, numbers: Tensor) -> Tensor:
        """ln(sigma / alpha) (b,) and numbers (b, k) -> (b, 2 * width)."""
        phase = log_ratio.float().clamp(*LEVELS)[:, None] / 4.0 * self.frequencies
        return self.embed(torch.cat([phase.cos(), phase.sin(), numbers], 1))

    def ended(self, hidden: Tensor) -> Tensor:
        """(b, width, *spatial) -> (b, outputs, *spatial)."""
        return self.last(functional.silu(self.norm(hidden)))


class LocalNetwork(ResidualTrunk):
    """Residual blocks that are told coordinates and an embedding of the noise level and of numbers; starts at zero.

    Parameters
    ----------
    spatial_dims
        2 or 3.
    inputs, outputs
        Channels.
    numbers
        Numbers about the whole image, beside the noise level.
    width, blocks
        Channels inside, and residual blocks.
    tokens
        Width of tokens that every place attends to after each block; 0: there are none.
    """

    def __init__(
        self, spatial_dims: int, inputs: int, outputs: int, numbers: int, width: int, blocks: int, tokens: int = 0
    ) -> None:
        super().__init__(spatial_dims, inputs, numbers, width, blocks)
        self.attend = nn.ModuleList(CrossAttention(width, tokens) for _ in range(blocks if tokens else 0))
        self.add_end(spatial_dims, width, outputs)
        #: Voxels around one that its output depends on.
        self.reach = 2 * blocks + 2

    def forward(
        self,
        x: Tensor,
        place: Tensor,
        log_ratio: Tensor,
        numbers: Tensor,
        tokens: Tensor | None = None,
        there: Tensor | None = None,
    ) -> Tensor:
        """x (b, inputs, *spatial), its coordinates (b, d, *spatial), ln(sigma / alpha) (b,), numbers (b, k), and tokens
        (b, m, dim) with which of them are there (b, m) -> (b, outputs, *spatial).
        """
        embedding = self.embedding(log_ratio, numbers)
        hidden = self.first(dense(torch.cat([x, place.to(x.dtype)], 1)))
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, embedding)
            if tokens is not None and there is not None:
                hidden = self.attend[number](hidden, tokens, there)
        return self.ended(hidden)


class ResNet(nn.Module):
    """`LocalNetwork` as a denoiser: told covariates, the variant of a training image, maps on the latents' grid, and
    tokens, which every place attends to.

    Parameters
    ----------
    settings
        The study's `diffusion` section; the first of `channels` is the width.
    latent_shape
        (c, *spatial).
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    variants
        Numbers that describe a variant.
    maps, tokens
        Channels of every map and width of every kind of token, by name.
    """

    place: Tensor

    def __init__(
        self,
        settings: config.Diffusion,
        latent_shape: Sequence[int],
        levels: list[int],
        variants: int,
        maps: Mapping[str, int],
        tokens: Mapping[str, int],
    ) -> None:
        super().__init__()
        channels, *spatial = latent_shape
        self.process, self.levels, self.variants = NoiseProcess.of(settings), levels, variants
        self.maps = {name: maps[name] for name in sorted(maps)}
        self.register_buffer("place", coordinates(spatial)[None], persistent=False)
        numbers = 2 * feature_count(levels) + variants
        inputs = channels + sum(self.maps.values())
        self.widths, dim = {name: tokens[name] for name in sorted(tokens)}, settings.covariate_dim if tokens else 0
        width, blocks = settings.channels[0], settings.num_res_blocks
        self.net = LocalNetwork(len(spatial), inputs, channels, numbers, width, blocks, dim)
        self.tokens = AttendedTokens(self.widths, dim) if tokens else None
        if settings.gradient_checkpointing:
            recompute(self.net.blocks)

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [self.net]

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """x (b, c, *spatial) of unit variance, timesteps (b,) -> (b, c, *spatial)."""
        alpha, sigma = self.process.alpha_sigma(timesteps)
        values, known = covariate_features(condition.covariates, self.levels)
        numbers = torch.cat([values, known.float(), condition.variant_numbers(self.variants)], 1)
        maps = condition.maps_of(self.maps)
        place = self.place.expand(len(x), *self.place.shape[1:])
        told = [] if self.tokens is None else self.tokens(condition.tokens_of(self.widths))
        return self.net(torch.cat([x, *maps], 1), place, sigma.log() - alpha.log(), numbers, *told)


def build(
    settings: config.Diffusion,
    latent_shape: Sequence[int],
    levels: list[int],
    variants: int,
    maps: Mapping[str, int],
    tokens: Mapping[str, int],
) -> ResNet:
    """The network with fresh weights; parameters as of `ResNet`."""
    return ResNet(settings, latent_shape, levels, variants, maps, tokens)


def tell(state: dict[str, Tensor], part: str, new: NewLevel) -> None:
    """One column more, in place, for the value of the new level; that it is known says nothing that the covariate's
    other levels do not.
    """
    name = f"{part}net.embed.0.weight"
    weight, first = state[name], 2 * FREQUENCIES
    known = inserted(weight, 0.0, first + new.features + new.feature, 1)
    state[name] = inserted(known, new.mixed(weight, 1, first), first + new.feature, 1)
