"""The first stage as everything else sees it: images to a posterior over latents, and latents to images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import FIRST_STAGES


@dataclass(frozen=True)
class Posterior:
    """What an image can mean: independent Gaussians over latents (Kingma and Welling 2014).

    Attributes
    ----------
    mean, log_variance
        float32 (b, c, *spatial).
    """

    mean: Tensor
    log_variance: Tensor

    def mode(self) -> Tensor:
        """The most probable latents, (b, c, *spatial)."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Latents drawn with standard normal `noise` of the same shape."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def columns(self) -> dict[str, Tensor]:
        """What a latent shard keeps of it, by column name."""
        return {"mean": self.mean, "log_variance": self.log_variance}

    def kl_divergence(self) -> Tensor:
        """KL(N(mean, variance) || N(0, 1)) per image in nats, summed over the latent; float32 (b,).

        Kingma and Welling 2014, appendix B.
        """
        mean, log_variance = self.mean.float(), self.log_variance.float()
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1)


class FirstStage(Protocol):
    """A trained or trainable network between images in [0, 1] and latents.

    Attributes
    ----------
    downsampling
        Voxels per latent cell along one axis.
    draws
        Whether `decode` draws what the latents leave open, and so can be given noise.
    """

    downsampling: int
    draws: bool

    def encode(self, images: Tensor) -> Posterior:
        """Posterior of images (b, 1, *spatial) in [0, 1]; its latents are (b, c, *spatial / downsampling)."""

    def decode(self, latents: Tensor, noise: Tensor | None = None, slab: int | None = None) -> Tensor:
        """Images of final grey levels, float32 (b, 1, *spatial) in [0, 1].

        Without `noise` the mean of what the latents can mean; with it, where the stage `draws`, one draw.  `slab`:
        planes that layers are computed in, for less memory.
        """

    def __call__(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training needs: reconstructions of latents drawn with `noise`, before grey levels are corrected, and the
        posterior's mean and log-variance.
        """

    def fit_before_training(self, images: Tensor) -> None:
        """Set what is known in closed form from some training images (n, 1, *spatial); maybe nothing."""

    def fit_grey_levels(self, scans: Iterable[Tensor]) -> None:
        """Give decoded images the grey levels of training scans, (1, 1, *spatial) each, at least one; after
        training.
        """

    @property
    def costly(self) -> Mapping[str, nn.Module]:
        """The parts that take nearly all of the time, `encoder` and `decoder`: what is worth compiling."""


def build(settings: config.Autoencoder, spatial_dims: int) -> Any:
    """The network that `settings.network` names, with fresh weights: a module that is a `FirstStage`."""
    return FIRST_STAGES.load(settings.network).build(settings, spatial_dims)


def latent_shape(settings: config.Autoencoder, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(latent_channels, *spatial) of images (1, *spatial)."""
    return (settings.latent_channels, *(n // settings.downsampling for n in image_shape[1:]))


def reconstruct(stage: FirstStage, images: Tensor) -> Tensor:
    """`images` (b, 1, *spatial), encoded and decoded from their most probable latents."""
    return stage.decode(stage.encode(images).mode())
