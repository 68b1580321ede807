"""MONAI's diffusion UNet alone, as published models have it: it gives the whole prediction.

Two kinds: DiffusionModelUNet, which is told numbers by constant channels beside the latents, by one vector that it
attends to, or by both (Pinaya et al. 2022); and DiffusionModelUNetMaisi, which is told the size of voxels and a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition

ENTRY = {
    "order": 3,
    "summary": "MONAI's DiffusionModelUNet (or MAISI's) alone, for weights of published bundles",
    "source": "Rombach et al. 2022; Pinaya et al. 2022; Guo et al. 2025 (MAISI)",
    "conditions": ["covariates"],
    "cost": "as of `unet`",
    "whole": True,
}

#: MAISI networks are told the size of voxels in these units per mm (`diff_model_infer.py` of NV-Generate-CTMR).
MAISI_SPACING = 100.0


class PublishedUNet(nn.Module):
    """The prediction itself, from latents, the time and the numbers that the network was made to be told.

    A covariate that is not known (NaN) is told as a learnt number, at first the `value` of its input.

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    latent_shape
        (c, *spatial).
    levels
        Per covariate: the number of levels, or 0 for a continuous one, whose encoded values are 0 and 1 at the ends of
        the input's `range` (`CovariateEncoding.scaled`).
    names
        Of the covariates.

    Raises
    ------
    UserError
        An input is a covariate that there is not.
    """

    table: Tensor

    def __init__(
        self, settings: config.Diffusion, latent_shape: Sequence[int], levels: list[int], names: Sequence[str]
    ) -> None:
        super().__init__()
        told = settings.published
        unknown = [each.covariate for each in told.inputs if each.covariate is not None and each.covariate not in names]
        if unknown:
            raise UserError(
                f"diffusion.published.inputs: {unknown} are no covariates of this model, which has {list(names)}."
                " Correct the names."
            )
        #: Column of the covariates per input, or None.
        self.columns = [None if each.covariate is None else list(names).index(each.covariate) for each in told.inputs]
        self.told_by = frozenset(told.told_by) if told.inputs else frozenset()
        self.levelled = [each.levels is not None for each in told.inputs]
        self.flow = settings.prediction_type == "flow"
        if told.inputs:
            self.missing = nn.Parameter(torch.tensor([each.value for each in told.inputs]))
        # Number per input and level, levels being encoded by their place; continuous inputs have none.
        table = torch.zeros(len(told.inputs), max([1, *(len(each.levels or ()) for each in told.inputs)]))
        for row, each in enumerate(told.inputs):
            table[row, : len(each.levels or ())] = torch.tensor(each.levels or [])
        # Made of the settings, so it need not travel with the weights
        self.register_buffer("table", table, persistent=False)
        spatial_dims, latent_channels = len(latent_shape) - 1, latent_shape[0]
        depth = len(settings.channels)
        heads = told.head_channels or [settings.num_head_channels] * depth
        concatenated = len(told.inputs) if "concatenation" in self.told_by else 0
        attends = "cross_attention" in self.told_by
        shared: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "in_channels": latent_channels + concatenated,
            "out_channels": latent_channels,
            "num_res_blocks": (settings.num_res_blocks,) * depth,
            "attention_levels": tuple(settings.attention_levels),
            "norm_num_groups": settings.norm_num_groups,
            "resblock_updown": told.resblock_updown,
            "num_head_channels": tuple(heads),
            "with_conditioning": attends,
            "transformer_num_layers": told.transformer_num_layers,
            "cross_attention_dim": len(told.inputs) if attends else None,
            "upcast_attention": told.upcast_attention,
            "include_fc": True,
        }
        self.maisi = told.maisi
        self.unet: nn.Module
        if told.maisi is None:
            self.unet = DiffusionModelUNet(channels=tuple(settings.channels), use_flash_attention=True, **shared)
        else:
            self.unet = DiffusionModelUNetMaisi(
                num_channels=tuple(settings.channels),
                num_class_embeds=told.maisi.num_class_embeds or None,
                include_spacing_input=told.maisi.spacing_mm is not None,
                use_flash_attention=torch.cuda.is_available(),  # MONAI refuses it elsewhere
                **shared,
            )
        if settings.gradient_checkpointing:
            recompute([*self.unet.down_blocks, self.unet.middle_block, *self.unet.up_blocks])

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [self.unet]

    def numbers(self, covariates: Tensor) -> Tensor:
        """What the network is told of encoded covariates (b, k), NaN where not known; (b, inputs)."""
        told = []
        for place, column in enumerate(self.columns):
            missing = self.missing[place].expand(len(covariates))
            if column is None:
                told.append(missing)
                continue
            value = covariates[:, column]
            known = torch.isfinite(value)
            value = torch.where(known, value, torch.zeros_like(value))
            if self.levelled[place]:
                value = self.table[place][value.long()]
            told.append(torch.where(known, value, missing))
        return torch.stack(told, 1)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """x (b, c, *spatial), timesteps (b,) -> the prediction, (b, c, *spatial)."""
        if self.maisi is not None:
            given: dict[str, Tensor] = {}
            if self.maisi.num_class_embeds:
                given["class_labels"] = torch.full_like(timesteps, self.maisi.class_label, dtype=torch.long)
            if self.maisi.spacing_mm is not None:
                spacing = MAISI_SPACING * torch.tensor(self.maisi.spacing_mm, dtype=x.dtype, device=x.device)
                given["spacing_tensor"] = spacing.expand(len(x), 3)
            # Its flow is the velocity from noise to data (`RFlowScheduler`); ours from data to noise.
            predicted = self.unet(x, timesteps, **given)
            return -predicted if self.flow else predicted
        if not self.columns:
            return self.unet(x, timesteps)
        numbers = self.numbers(condition.covariates).to(x.dtype)
        if "concatenation" in self.told_by:
            maps = numbers.reshape(*numbers.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, maps], 1)
        return self.unet(x, timesteps, numbers[:, None] if "cross_attention" in self.told_by else None)


def build(
    settings: config.Diffusion,
    latent_shape: Sequence[int],
    levels: list[int],
    variants: int,
    maps: Mapping[str, int],
    tokens: Mapping[str, int],
    names: Sequence[str],
) -> PublishedUNet:
    """The network with fresh weights; it is told neither variants of images, nor maps, nor tokens.

    Raises
    ------
    UserError
        There are maps or tokens.
    """
    if maps or tokens:
        raise UserError(
            f"diffusion.network: published is told no maps or tokens, found {sorted([*maps, *tokens])}. Take unet."
        )
    return PublishedUNet(settings, latent_shape, levels, names)
