"""The first stage as everything else sees it: images to a posterior over latents, and latents to images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.core.registries import FIRST_STAGES

if TYPE_CHECKING:
    from meddiff_steps.models.first_stage.quantiser import Codebooks


@dataclass(frozen=True)
class Posterior:
    """What an image can mean: independent Gaussians over latents (Kingma and Welling 2014), or one point.

    Attributes
    ----------
    mean
        float32 (b, c, *spatial).
    log_variance
        As the mean; None where an image has just one set of latents.
    """

    mean: Tensor
    log_variance: Tensor | None = None

    def mode(self) -> Tensor:
        """The most probable latents, (b, c, *spatial)."""
        return self.mean

    def sample(self, noise: Tensor, amplitude: Tensor | float = 0.0) -> Tensor:
        """Latents drawn with standard normal `noise` of the same shape.

        `amplitude`, a number or (b, 1, ...), adds noise of that many standard deviations of each image's latents.
        """
        spread = self.mean.detach().flatten(1).std(1).reshape(-1, *[1] * (self.mean.ndim - 1))
        variance = (amplitude * spread) ** 2
        if self.log_variance is not None:
            variance = variance + self.log_variance.exp()
        return self.mean + variance**0.5 * noise

    def halved(self) -> Posterior:
        """The same of latents at half the resolution: means of 2 x 2 (x 2) cells, where a side is even."""
        kept = {name: halved(value) for name, value in self.columns().items()}
        return Posterior(**kept)

    def columns(self) -> dict[str, Tensor]:
        """What a latent shard keeps of it, by column name."""
        kept = {"mean": self.mean, "log_variance": self.log_variance}
        return {name: value for name, value in kept.items() if value is not None}

    def kl_divergence(self) -> Tensor:
        """KL(N(mean, variance) || N(0, 1)) per image in nats, summed over the latent; float32 (b,).

        Kingma and Welling 2014, appendix B. 0 where there is no variance.
        """
        if self.log_variance is None:
            return self.mean.new_zeros(len(self.mean))
        mean, log_variance = self.mean.float(), self.log_variance.float()
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1)


class FirstStage(nn.Module, ABC):
    """A trained or trainable network between images in [0, 1] and latents; a variant derives from it.

    Attributes
    ----------
    downsampling
        Voxels per latent cell along one axis.
    image_channels
        1 of scans; more where label maps are encoded (`imaging.signed_distances.channels`).
    """

    downsampling: int

    def __init__(self, image_channels: int = 1) -> None:
        super().__init__()
        self.image_channels = image_channels

    @abstractmethod
    def encode(self, images: Tensor) -> Posterior:
        """Posterior of images (b, 1, *spatial) in [0, 1]; its latents are (b, c, *spatial / downsampling)."""

    @abstractmethod
    def decode(self, latents: Tensor, slab: int | None = None) -> Tensor:
        """The mean image of latents, float32 (b, 1, *spatial), nominally in [0, 1], not clipped.

        With `slab` planes of the image at a time where the whole would not fit into memory; the same but for rounding.
        """

    @property
    @abstractmethod
    def costly(self) -> Mapping[str, nn.Module]:
        """The parts that take nearly all of the time, `encoder` and `decoder`: what is worth compiling."""

    @property
    def reading(self) -> Sequence[nn.Module]:
        """The parts that make latents of images: what `autoencoder.trains: decoder` leaves alone."""
        return [self.costly["encoder"]]

    @property
    def quantiser(self) -> Codebooks | None:
        """What `decode` moves latents to first; None where it takes them as they are."""
        return None

    def forward(
        self, images: Tensor, noise: Tensor, amplitude: Tensor, coarse: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """What training needs: images decoded from latents with noise (`Posterior.sample`); with `coarse` those that
        are decoded from latents at half the resolution; the posterior's mean and log-variance.
        """
        posterior = self.encode(images)
        made, small = self.decode(posterior.sample(noise, amplitude)), None
        if coarse:
            half = posterior.halved()
            corner = noise[tuple(slice(n) for n in half.mean.shape)]
            small = self.decode(half.sample(corner, amplitude))
        return made, small, posterior.mean, posterior.log_variance


def widest(channels: Sequence[int], spatial_dims: int) -> float:
    """Channels of the largest tensor of a first stage with so many `channels` per level, as if it lay at the resolution
    of the first level.

    On the way up, a level has the channels of the one below before it has its own.
    """
    pairs = zip(channels, [*channels[1:], 0], strict=True)
    return max(max(pair) / 2 ** (spatial_dims * level) for level, pair in enumerate(pairs))


def halved(x: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """x (b, c, *spatial) at half the resolution, or at `size`, by means of the voxels that a new one covers."""
    size = [max(1, n // 2) for n in x.shape[2:]] if size is None else list(size)
    return functional.interpolate(x, size=size, mode="area")


def build(settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> FirstStage:
    """The network that `settings.network` names, with fresh weights."""
    more = () if image_channels == 1 else (image_channels,)  # a variant may know scans alone
    return FIRST_STAGES.load(settings.network).build(settings, spatial_dims, *more)


def latent_shape(settings: config.Autoencoder, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(latent_channels, *spatial) of images (1, *spatial)."""
    return (settings.latent_channels, *(n // settings.downsampling for n in image_shape[1:]))


def reconstruct(stage: FirstStage, images: Tensor) -> Tensor:
    """`images` (b, 1, *spatial), encoded and decoded from their most probable latents, float32 in [0, 1]."""
    return stage.decode(stage.encode(images).mode()).clamp(0.0, 1.0)
