"""The peers' way, against MONAI's public API as its tutorials use it: what our side is measured beside.

Two peers train a diffusion model.  One is the tutorial as it is (Project-MONAI/tutorials `generation/3d_ldm`): an
autoencoder that sees full resolution, every image encoded again at every step, contiguous memory.  The other caches
latents and learns a rectified flow, as MAISI's tutorial does (`generation/maisi`); it is the stronger one.  Each has
the learning rate, the loss and the precision of its own script (`Recipe`).  Data are read from `.nii.gz` by
`CacheDataset` or `PersistentDataset`; samplers are `DDIMScheduler` and `RFlowScheduler`, with two passes per step where
there is guidance and one where there is none, volumes decoded one by one; diversity is MS-SSIM over all ordered pairs,
as in Warvito/generative_brain.

A fair copy: networks are sized by the study's own settings (`autoencoder_widths`); batch, noise schedule and data are
those of our side.  What the tutorials do that is slow and has no bearing on the method is left out, in their favour:
anomaly detection during training, TensorBoard at every step, perceptual loss and discriminator (our side has neither
by default), latents as `.nii.gz` (here they lie in memory).  `clip_sample` is off, since its default clips latents to
+-1.

Every function takes the device and the sizes; nothing here reads or sets a global.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.inferers import DiffusionInferer, LatentDiffusionInferer
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImage,
    LoadImaged,
    Orientationd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    SpatialPadd,
)
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config

Device = torch.device | str

#: What MONAI's inferers put in place of a condition for the unconditional pass (`cfg_fill_value`).
NULL_CONDITION = -1.0


@dataclass(frozen=True)
class Recipe:
    """How a peer's script trains.

    Attributes
    ----------
    source
        The script.
    learning_rate
        Of Adam.  Constant here: the scripts' schedules lower it over far more steps than are run.
    half
        Whether the step runs under float16 autocast with a GradScaler on a GPU; on a processor all of them run in
        float32, for their autocast is CUDA's.
    """

    source: str
    learning_rate: float
    half: bool

    @property
    def said(self) -> str:
        """For a table."""
        rate = f"{self.learning_rate:.0e}".replace("e-0", "e-")
        return f"{self.source}: Adam at {rate}, no warm-up, no clipping, no averaged weights"


#: The scripts' own settings, from Project-MONAI/tutorials' `config_train_32g.json` and `config_maisi_diff_model.json`.
AUTOENCODER = Recipe("3d_ldm/train_autoencoder.py", 1e-5, half=False)
DIFFUSION = Recipe("3d_ldm/train_diffusion.py", 1e-5, half=True)
CACHED = Recipe("maisi/diff_model_train.py", 1e-4, half=True)
#: The first at a rate at which it learns something in the minutes of a benchmark: that of ours where it has AdamW.
AUTOENCODER_RAISED = replace(AUTOENCODER, learning_rate=1e-3)


#: UNets of the tutorials: the smallest, and that of `config_train_32g.json` for studies whose own network is as wide as
#: the second says.
SMALL_UNET = {"channels": [32, 64], "attention_levels": [False, True], "num_res_blocks": 1}
LARGE_UNET = {
    "channels": [256, 256, 512],
    "attention_levels": [False, True, True],
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "norm_num_groups": 32,
}
WIDE = 128


def unet_settings(settings: config.Diffusion) -> config.Diffusion:
    """By which their UNet is sized: a study's section if it has a UNet, else that of a tutorial."""
    if settings.network == "unet":
        return settings
    chosen = LARGE_UNET if settings.channels[0] >= WIDE else SMALL_UNET
    return settings.model_copy(update={"network": "unet", **chosen})


# ------------------------------------------------------------------------------------------------ first stage


def autoencoder_widths(settings: config.Autoencoder) -> tuple[int, ...]:
    """Channels per level of the peer that reaches our latent grid.

    Without a stem it needs a level at full resolution.  That gets half the first width, as widths double from level to
    level in the tutorial's configurations: the narrowest choice, and the one whose number of weights is nearest to
    ours.
    """
    return tuple(settings.channels) if settings.stem == "none" else (settings.channels[0] // 2, *settings.channels)


def same_network(settings: config.Autoencoder) -> config.Autoencoder:
    """Our section with the peer's network: AutoencoderKL of the same widths, whose first level is at full
    resolution.
    """
    channels = list(autoencoder_widths(settings))
    groups = min(settings.norm_num_groups, channels[0])
    return settings.model_copy(
        update={"network": "kl", "stem": "none", "channels": channels, "norm_num_groups": groups}
    )


def peer_autoencoder(settings: config.Autoencoder, device: Device, spatial_dims: int = 3) -> AutoencoderKL:
    """MONAI's AutoencoderKL for images (b, 1, *spatial), sized like the study's first stage, without attention (as in
    the tutorials).
    """
    channels = autoencoder_widths(settings)
    return AutoencoderKL(
        spatial_dims=spatial_dims,
        in_channels=1,
        out_channels=1,
        channels=channels,
        latent_channels=settings.latent_channels,
        num_res_blocks=(settings.num_res_blocks,) * len(channels),
        norm_num_groups=min(settings.norm_num_groups, channels[0]),
        attention_levels=(False,) * len(channels),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).to(device)


def peer_optimiser(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adam at a constant rate, as in the tutorials for as long as is measured here."""
    return torch.optim.Adam(network.parameters(), lr=learning_rate)


def kl_loss(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL divergence in nats, summed over the latent, mean over images; from the standard deviation, as the tutorials
    have it.
    """
    axes = list(range(1, mean.ndim))
    return (0.5 * torch.sum(mean.pow(2) + deviation.pow(2) - torch.log(deviation.pow(2)) - 1, dim=axes)).mean()


def peer_autoencoder_step(
    network: AutoencoderKL, optimiser: torch.optim.Optimizer, images: Tensor, kl_weight: float
) -> float:
    """One update on images (b, 1, *spatial) in [0, 1]: L1 + KL; returns the reconstruction loss (a synchronisation, as
    their logging is).
    """
    network.train()
    optimiser.zero_grad(set_to_none=True)
    reconstruction, mean, deviation = network(images)
    reconstruction_loss = functional.l1_loss(reconstruction.float(), images.float())
    loss = reconstruction_loss + kl_weight * kl_loss(mean, deviation)
    loss.backward()
    optimiser.step()
    return reconstruction_loss.item()


@torch.no_grad()
def peer_psnr(network: AutoencoderKL, images: Tensor) -> float:
    """Mean PSNR (dB, range 1) of reconstructions of images (n, 1, *spatial), one by one, the posterior mean decoded and
    clipped as ours.
    """
    network.eval()
    errors = [(network.reconstruct(image[None]).clamp(0, 1) - image[None]).square().mean() for image in images]
    return float(np.mean([-10.0 * float(error.clamp_min(1e-12).log10()) for error in errors]))


# ----------------------------------------------------------------------------------------------- second stage


def peer_unet(
    settings: config.Diffusion, latent_channels: int, covariates: int, device: Device, spatial_dims: int = 3
) -> DiffusionModelUNet:
    """MONAI's DiffusionModelUNet, sized by `unet_settings`; covariates enter as one cross-attention token (b, 1,
    covariates).
    """
    settings = unet_settings(settings)
    depth = len(settings.channels)
    # Heads of levels without attention are 0 in the tutorials; the middle block takes the last level's.
    heads = tuple(
        settings.num_head_channels if attends or level == depth - 1 else 0
        for level, attends in enumerate(settings.attention_levels)
    )
    return DiffusionModelUNet(
        spatial_dims=spatial_dims,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_res_blocks=(settings.num_res_blocks,) * depth,
        channels=tuple(settings.channels),
        attention_levels=tuple(settings.attention_levels),
        norm_num_groups=settings.norm_num_groups,
        num_head_channels=heads,
        with_conditioning=True,
        cross_attention_dim=covariates,
    ).to(device)


def peer_scheduler(settings: config.Diffusion) -> DDPMScheduler:
    """The forward process of training; epsilon is predicted, as in the tutorials and the published brain model's
    bundle.
    """
    return DDPMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        schedule="scaled_linear_beta",
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        clip_sample=False,
    )


@torch.no_grad()
def peer_scale_factor(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """1 / standard deviation of the latents of the first batch (b, 1, *spatial): the tutorials' scale factor."""
    return float(1.0 / autoencoder.encode_stage_2_inputs(images).std())


def peer_context(covariates: np.ndarray, device: Device) -> Tensor:
    """Encoded covariates (b, k), NaN where missing, as one token (b, 1, k); a missing one is 0, its mean (there is no
    null token).
    """
    return torch.from_numpy(np.nan_to_num(covariates, nan=0.0).astype(np.float32))[:, None].to(device)


class Precision:
    """Autocast and loss scaling of a script, where the device has what it asks for.

    Parameters
    ----------
    half
        Of the recipe; on a processor it is not heeded.
    """

    def __init__(self, device: Device, half: bool) -> None:
        self.device = torch.device(device).type
        self.half = half and self.device == "cuda"
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.half)

    def autocast(self) -> torch.autocast:
        """float16, the default of `torch.amp.autocast("cuda")`."""
        return torch.autocast(self.device, dtype=torch.float16 if self.half else None, enabled=self.half)

    def update(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        """One step down `loss`, scaled where it has to be."""
        self.scaler.scale(loss).backward()
        self.scaler.step(optimiser)
        self.scaler.update()


def dropped(context: Tensor, share: float) -> Tensor:
    """Context (b, 1, k), a share of whose rows became `NULL_CONDITION`, drawn anew (the guidance tutorial: 0.15)."""
    if not share:
        return context
    chosen = torch.rand((len(context), 1, 1), device=context.device) < share
    return torch.where(chosen, torch.full_like(context, NULL_CONDITION), context)


def peer_diffusion_step(
    network: DiffusionModelUNet,
    autoencoder: AutoencoderKL,
    inferer: LatentDiffusionInferer,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    context: Tensor,
    latent_shape: Sequence[int],
    precision: Precision,
) -> float:
    """One update of the tutorial on images (b, 1, *spatial), which the inferer encodes first; returns the loss (a
    synchronisation).

    Parameters
    ----------
    inferer
        Holds `peer_scheduler` and the scale factor.
    context
        From `peer_context`, or `dropped`.
    latent_shape
        (c, *spatial).
    """
    network.train()
    autoencoder.eval()
    optimiser.zero_grad(set_to_none=True)
    with precision.autocast():
        noise = torch.randn((len(images), *latent_shape), dtype=images.dtype).to(images.device)
        count = inferer.scheduler.num_train_timesteps
        timesteps = torch.randint(0, count, (len(images),), device=images.device).long()
        predicted = inferer(
            inputs=images,
            autoencoder_model=autoencoder,
            diffusion_model=network,
            noise=noise,
            timesteps=timesteps,
            condition=context,
        )
        loss = functional.mse_loss(predicted.float(), noise.float())
    precision.update(loss, optimiser)
    return loss.item()


def peer_cached_step(
    network: DiffusionModelUNet,
    scheduler: RFlowScheduler,
    optimiser: torch.optim.Optimizer,
    latents: Tensor,
    context: Tensor,
    precision: Precision,
) -> float:
    """One update of MAISI's on cached latents (b, c, *spatial), scaled already; L1 of the flow's velocity."""
    network.train()
    optimiser.zero_grad(set_to_none=True)
    with precision.autocast():
        noise = torch.randn(latents.shape, device=latents.device)
        timesteps = scheduler.sample_timesteps(latents)
        noisy = scheduler.add_noise(original_samples=latents, noise=noise, timesteps=timesteps)
        predicted = network(x=noisy, timesteps=timesteps, context=context)
        loss = functional.l1_loss(predicted.float(), (latents - noise).float())
    precision.update(loss, optimiser)
    return loss.item()


def peer_ddim(settings: config.Diffusion, num_inference_steps: int, prediction_type: str = "epsilon") -> DDIMScheduler:
    """MONAI's DDIMScheduler, set to a number of steps, unclipped; its tables stay on the host, as the inferer wants."""
    scheduler = DDIMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        schedule="scaled_linear_beta",
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        clip_sample=False,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(num_inference_steps=num_inference_steps)
    return scheduler


def peer_flow(settings: config.Diffusion, num_inference_steps: int | None = None) -> RFlowScheduler:
    """MONAI's scheduler of rectified flows with uniform times, set to a number of steps where it is to sample.

    MAISI's shift of times is left out: it is for images larger than 32^3 cells, and would shift the other way here.
    """
    scheduler = RFlowScheduler(num_train_timesteps=settings.num_train_timesteps, use_discrete_timesteps=False)
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps=num_inference_steps)
    return scheduler


@torch.no_grad()
def peer_sample(
    network: nn.Module,
    decode: Callable[[Tensor], Tensor],
    scheduler: DDIMScheduler | RFlowScheduler,
    noise: Tensor,
    context: Tensor,
    guidance_scale: float | None,
    null: float = NULL_CONDITION,
) -> Tensor:
    """Images (b, 1, *spatial): a scheduler's steps, both passes of guidance at each where there is guidance, then
    decoding one by one.

    Parameters
    ----------
    network
        Called as network(x, timesteps=, context=).
    decode
        Latents (1, c, *spatial) to an image; of a peer `lambda z: autoencoder.decode_stage_2_outputs(z /
        scale_factor)`.
    scheduler
        From `peer_ddim` or `peer_flow`.
    noise, context
        (b, c, *spatial) and (b, 1, k).
    guidance_scale
        None: no guidance, and one pass per step.
    null
        What stands for no condition.
    """
    latents = DiffusionInferer(scheduler).sample(
        input_noise=noise,
        diffusion_model=network,
        scheduler=scheduler,
        conditioning=context,
        cfg=guidance_scale,
        cfg_fill_value=null,
        verbose=False,
    )
    return torch.cat([decode(latent[None]) for latent in latents])


# ------------------------------------------------------------------------------------------------------- data


def peer_transform(settings: config.Preprocess) -> Compose:
    """`.nii.gz` to (1, *shape) in [0, 1], with the tutorials' transforms and the study's grid and percentiles."""
    shape = tuple(settings.shape)
    return Compose(
        [
            LoadImaged(keys=["image"]),
            EnsureChannelFirstd(keys=["image"]),
            EnsureTyped(keys=["image"]),
            Orientationd(keys=["image"], axcodes="RAS", labels=None),
            Spacingd(keys=["image"], pixdim=(settings.spacing_mm,) * 3, mode="bilinear"),
            CenterSpatialCropd(keys=["image"], roi_size=shape),
            SpatialPadd(keys=["image"], spatial_size=shape),
            ScaleIntensityRangePercentilesd(
                keys=["image"],
                lower=settings.percentiles[0],
                upper=settings.percentiles[1],
                b_min=0,
                b_max=1,
                clip=True,
            ),
        ]
    )


def peer_loader(
    files: Sequence[Path],
    settings: config.Preprocess,
    batch_size: int,
    *,
    cache: str,
    folder: Path | None = None,
    shuffle: bool = True,
) -> DataLoader:
    """The tutorials' loader: batches {"image": (b, 1, *shape)}, last short batch kept, no worker processes.

    Parameters
    ----------
    cache
        `none` (Dataset), `memory` (CacheDataset, filled here) or `disk` (PersistentDataset under `folder`, filled in
        the first epoch).
    """
    data = [{"image": str(path)} for path in files]
    transform = peer_transform(settings)
    if cache == "memory":
        dataset: Dataset = CacheDataset(data=data, transform=transform, cache_rate=1.0, num_workers=0, progress=False)
    elif cache == "disk":
        dataset = PersistentDataset(data=data, transform=transform, cache_dir=str(folder))
    else:
        dataset = Dataset(data=data, transform=transform)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=0)


def peer_diversity(
    files: Sequence[Path], metric: MultiScaleSSIMMetric | SSIMMetric, limit: int | None = None
) -> np.ndarray:
    """MS-SSIM of all ordered pairs of files, (pairs,), both images read again for every pair, as the public scripts do
    it.

    `limit` stops after so many pairs; their cost does not depend on which they are.
    """
    read = LoadImage(image_only=True, ensure_channel_first=True)
    values = []
    for number, (first, second) in enumerate(permutations(files, 2)):
        if number == limit:
            break
        values.append(float(metric(read(first)[None], read(second)[None])))
    return np.array(values)


def cached_bytes(folder: Path) -> int:
    """Bytes of the files that a PersistentDataset wrote."""
    return sum(os.path.getsize(path) for path in Path(folder).rglob("*") if path.is_file())
