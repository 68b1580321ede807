"""The light residual network, told covariates and maps in the ways that the literature has, so that they can be
compared.

All else is that of `resnet`: the noise level and the variant modulate the second normalisation of every block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import convolution, coordinates, dense, silence
from meddiff_steps.models.denoiser.effects import covariate_features, feature_count
from meddiff_steps.models.denoiser.resnet import ResidualTrunk
from meddiff_steps.models.denoiser.tokens import CovariateTokens, CrossAttention

ENTRY = {
    "order": 4,
    "summary": "`resnet`, told covariates and maps as `diffusion.conditioning` says, to compare these ways",
    "source": "Perez et al. 2018 (FiLM); Dhariwal and Nichol 2021 (adaptive normalisation); Rombach et al. 2022 "
    "(cross-attention); Park et al. 2019 (SPADE); Zhang et al. 2023 (ControlNet)",
    "conditions": ["covariates", "maps"],
    "cost": "as of `resnet`; with `controlnet` twice that",
}


class SpatialModulation(nn.Module):
    """Scales and shifts features at every place by what a map shows there (SPADE, Park et al. 2019, equation 1); starts
    as the identity.
    """

    def __init__(self, spatial_dims: int, channels: int, maps: int) -> None:
        super().__init__()
        self.first = convolution(spatial_dims, maps, channels)
        self.last = convolution(spatial_dims, channels, 2 * channels)
        silence(self.last)

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        """x (b, channels, *spatial), maps (b, c, *spatial) -> as x."""
        gain, shift = self.last(functional.silu(self.first(maps))).chunk(2, 1)
        return torch.addcmul(x + shift, x, gain)


class Control(nn.Module):
    """A copy of a network's blocks that sees the map, and adds what it makes of it after each of the network's own
    (ControlNet, Zhang et al. 2023, equation 2, at one resolution); starts as zero.
    """

    def __init__(self, spatial_dims: int, channels: int, maps: int, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = copy.deepcopy(blocks)
        last = convolution(spatial_dims, channels, channels)
        kind = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        leave = [kind(channels, channels, 1) for _ in blocks]
        for layer in (last, *leave):
            silence(layer)
        self.enter = nn.Sequential(convolution(spatial_dims, maps, channels), nn.SiLU(), last)
        self.leave = nn.ModuleList(leave)

    def forward(self, hidden: Tensor, maps: Tensor, embedding: Tensor) -> list[Tensor]:
        """Features (b, channels, *spatial), maps (b, c, *spatial), embedding (b, width) -> what is to be added after
        each block.
        """
        hidden, added = hidden + self.enter(maps), []
        for block, leave in zip(self.blocks, self.leave, strict=True):
            hidden = block(hidden, embedding)
            added.append(leave(hidden))
        return added


class Network(ResidualTrunk):
    """What is worth compiling: everything between the encoded condition and the prediction.

    Parameters
    ----------
    spatial_dims, inputs, outputs, width, blocks
        As of `models.denoiser.resnet.LocalNetwork`.
    numbers
        Numbers about the whole image that modulate.
    features
        Numbers of the covariates, where these are added or concatenated, else 0.
    tokens
        Width of tokens of covariates, where these are attended to, else 0.
    maps
        Channels of maps, where these modulate or control, else 0.
    settings
        `diffusion.conditioning`.
    """

    def __init__(
        self,
        spatial_dims: int,
        inputs: int,
        outputs: int,
        width: int,
        blocks: int,
        *,
        numbers: int,
        features: int,
        tokens: int,
        maps: int,
        settings: config.Conditioning,
    ) -> None:
        constant = features if settings.covariates == "concatenation" else 0
        super().__init__(spatial_dims, inputs + constant, numbers, width, blocks)
        self.settings = settings
        added = features if settings.covariates == "addition" else 0
        add = [nn.Linear(added, width) for _ in range(blocks if added else 0)]
        for layer in add:
            silence(layer)
        self.add = nn.ModuleList(add)
        self.attend = nn.ModuleList(CrossAttention(width, tokens) for _ in range(blocks if tokens else 0))
        spatial = settings.maps == "spade" and maps > 0
        self.spade = nn.ModuleList(
            SpatialModulation(spatial_dims, width, maps) for _ in range(blocks if spatial else 0)
        )
        self.add_end(spatial_dims, width, outputs)
        controlled = settings.maps == "controlnet" and maps > 0
        self.control = Control(spatial_dims, width, maps, self.blocks) if controlled else None
        #: While only what knows no maps is trained; a network that is not being trained has both.
        self.base_alone = False

    def forward(
        self,
        x: Tensor,
        place: Tensor,
        log_ratio: Tensor,
        numbers: Tensor,
        features: Tensor,
        tokens: Tensor,
        maps: Tensor,
    ) -> Tensor:
        """x (b, inputs, *spatial), its coordinates, ln(sigma / alpha) (b,), numbers (b, k), features (b, f), tokens
        (b, m, dim), maps (b, c, *spatial) -> (b, outputs, *spatial); what there is none of has no channels.
        """
        embedding = self.embedding(log_ratio, numbers)
        flat = features.to(x.dtype)
        parts = [x, place.to(x.dtype)]
        if self.settings.covariates == "concatenation":
            parts.append(flat.reshape(*flat.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
        hidden = self.first(dense(torch.cat(parts, 1)))
        added: list[Tensor] = []
        if self.control is not None and not self.base_alone:
            added = self.control(hidden, maps, embedding)
        there = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        for number, block in enumerate(self.blocks):
            if self.add:
                hidden = hidden + self.add[number](features).to(hidden.dtype).reshape(len(x), -1, *[1] * (x.ndim - 2))
            hidden = block(hidden, embedding)
            if self.attend:
                hidden = self.attend[number](hidden, tokens, there)
            if self.spade:
                hidden = self.spade[number](hidden, maps)
            if added:
                hidden = hidden + added[number]
        return self.ended(hidden)


class ConditionedResNet(nn.Module):
    """`Network` as a denoiser.

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
    maps
        Channels of every map, by name.
    """

    place: Tensor

    def __init__(
        self,
        settings: config.Diffusion,
        latent_shape: Sequence[int],
        levels: list[int],
        variants: int,
        maps: Mapping[str, int],
    ) -> None:
        super().__init__()
        channels, *spatial = latent_shape
        told = settings.conditioning
        self.process, self.levels, self.variants, self.told = NoiseProcess.of(settings), levels, variants, told
        self.maps = {name: maps[name] for name in sorted(maps)}
        self.register_buffer("place", coordinates(spatial)[None], persistent=False)
        features, of_maps = 2 * feature_count(levels), sum(self.maps.values())
        modulating, attended = told.covariates == "modulation", told.covariates == "cross_attention"
        self.beside = told.maps == "concatenation"
        self.tokens = CovariateTokens(levels, settings.covariate_dim) if attended else None
        self.net = Network(
            *(len(spatial), channels + (of_maps if self.beside else 0), channels),
            *(settings.channels[0], settings.num_res_blocks),
            numbers=variants + (features if modulating else 0),
            features=0 if modulating or attended else features,
            tokens=settings.covariate_dim if attended else 0,
            maps=0 if self.beside else of_maps,
            settings=told,
        )
        if settings.gradient_checkpointing:
            recompute([*self.net.blocks, *(self.net.control.blocks if self.net.control is not None else [])])

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [self.net]

    def train_base(self, alone: bool) -> None:
        """What of a network with a control branch is trained: all but that branch, without maps; or it alone."""
        if self.net.control is not None:
            self.requires_grad_(alone)
            self.net.control.requires_grad_(not alone)
            self.net.base_alone = alone

    def begin_control(self) -> None:
        """The control branch is from now on a copy of the blocks as they are."""
        if self.net.control is not None:
            self.net.control.blocks.load_state_dict(self.net.blocks.state_dict())

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """x (b, c, *spatial) of unit variance, timesteps (b,) -> (b, c, *spatial)."""
        alpha, sigma = self.process.alpha_sigma(timesteps)
        values, known = covariate_features(condition.covariates, self.levels)
        features, variant = torch.cat([values, known.float()], 1), condition.variant_numbers(self.variants)
        maps, none = torch.cat([x.new_empty(len(x), 0, *x.shape[2:]), *condition.maps_of(self.maps)], 1), x.new_empty
        tokens = none(len(x), 0, 0) if self.tokens is None else self.tokens(condition.covariates)
        numbers = torch.cat([features, variant], 1) if self.told.covariates == "modulation" else variant
        place = self.place.expand(len(x), *self.place.shape[1:])
        seen = torch.cat([x, maps], 1) if self.beside else x
        return self.net(seen, place, sigma.log() - alpha.log(), numbers, features, tokens, maps)


def build(
    settings: config.Diffusion,
    latent_shape: Sequence[int],
    levels: list[int],
    variants: int,
    maps: Mapping[str, int],
    tokens: Mapping[str, int],
) -> ConditionedResNet:
    """The network with fresh weights; parameters as of `ConditionedResNet`. It knows no tokens of others."""
    assert not tokens, "texts are refused by the study (ENTRY's conditions)"
    return ConditionedResNet(settings, latent_shape, levels, variants, maps)
