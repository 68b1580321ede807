"""MONAI's diffusion UNet, conditioned on any mix of covariates, each of which may be missing, on maps and on tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.denoiser.new_level import NewLevel, inserted
from meddiff_steps.models.denoiser.tokens import CovariateTokens, ProjectedTokens

ENTRY = {
    "order": 2,
    "summary": "MONAI's DiffusionModelUNet with attention where `attention_levels` says",
    "source": "Rombach et al. 2022; Pinaya et al. 2022",
    "conditions": ["covariates", "maps", "tokens"],
    "cost": "grows with the voxels of the latents; attention with their square",
    "grows": True,
}

#: Channels of the learnt map of positions that the network sees beside the latents.
POSITION_CHANNELS = 8


class UNet(nn.Module):
    """What is to be added to a closed-form prediction; starts at zero.

    It sees the latents, a learnt map of positions and the condition's maps, which must have the latents' grid.
    Covariates enter twice: as cross-attention tokens, and added to the time embedding, which reaches every residual
    block. Further tokens (text) are attended to beside them.

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    latent_shape
        (c, *spatial).
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    variants
        Numbers that describe a variant of a training image.
    maps, tokens
        Channels of every map and width of every kind of token, by name.
    """

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
        spatial_dims, latent_channels = len(latent_shape) - 1, latent_shape[0]
        depth = len(settings.channels)
        self.maps = {name: maps[name] for name in sorted(maps)}
        self.positions = nn.Parameter(torch.randn(1, POSITION_CHANNELS, *latent_shape[1:]))
        self.tokens = CovariateTokens(levels, settings.covariate_dim)
        self.unet = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=latent_channels + POSITION_CHANNELS + sum(self.maps.values()),
            out_channels=latent_channels,
            num_res_blocks=(settings.num_res_blocks,) * depth,
            channels=tuple(settings.channels),
            attention_levels=tuple(settings.attention_levels),
            norm_num_groups=settings.norm_num_groups,
            num_head_channels=settings.num_head_channels,
            with_conditioning=True,
            cross_attention_dim=settings.covariate_dim,
            num_class_embeds=1,
            use_flash_attention=True,
        )
        # MONAI adds class_embedding(class_labels) to the time embedding; with the identity in its place, the
        # covariate vector itself is added.
        self.unet.class_embedding = nn.Identity()  # type: ignore[assignment]
        time_dim, token_dim = 4 * settings.channels[0], len(levels) * settings.covariate_dim
        self.variants = variants
        last = nn.Linear(time_dim, time_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to_time = nn.Sequential(
            nn.LayerNorm(token_dim + variants), nn.Linear(token_dim + variants, time_dim), nn.SiLU(), last
        )
        self.widths = {name: tokens[name] for name in sorted(tokens)}
        self.to_context = nn.ModuleDict(
            {name: ProjectedTokens(width, settings.covariate_dim) for name, width in self.widths.items()}
        )
        if settings.gradient_checkpointing:
            recompute([*self.unet.down_blocks, self.unet.middle_block, *self.unet.up_blocks])

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [self.unet]

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """x (b, c, *spatial) of unit variance, timesteps (b,) -> (b, c, *spatial)."""
        covariates = self.tokens(condition.covariates)
        seen = [x, self.positions.expand(len(x), *self.positions.shape[1:]), *condition.maps_of(self.maps)]
        given = zip(self.to_context.values(), condition.tokens_of(self.widths), strict=True)
        context = [covariates, *(project(vectors) for project, vectors in given)]
        time = self.to_time(torch.cat([covariates.flatten(1), condition.variant_numbers(self.variants)], 1))
        return self.unet(torch.cat(seen, 1), timesteps=timesteps, context=torch.cat(context, 1), class_labels=time)


def build(
    settings: config.Diffusion,
    latent_shape: Sequence[int],
    levels: list[int],
    variants: int,
    maps: Mapping[str, int],
    tokens: Mapping[str, int],
) -> UNet:
    """The network with fresh weights; parameters as of `UNet`."""
    return UNet(settings, latent_shape, levels, variants, maps, tokens)


def tell(state: dict[str, Tensor], part: str, new: NewLevel) -> None:
    """A token for the new level, in place."""
    name = f"{part}tokens.embed.{new.covariate}.weight"
    tokens = state[name]
    state[name] = inserted(tokens, torch.tensordot(new.mix.to(tokens.dtype), tokens, 1), len(tokens))
