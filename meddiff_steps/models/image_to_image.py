"""A network that draws an image from other images of the same scan, or foretells it in one look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.files import read_json
from meddiff_steps.core.registries import SAMPLERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.sampling import levels_of, sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import coordinates, dense
from meddiff_steps.models.denoiser.base import gain
from meddiff_steps.models.denoiser.resnet import LocalNetwork
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.weights import load_weights

#: Name of what is given, among the maps of a condition.
SOURCE = "source"


def sampler() -> str:
    """What takes noise to an image; loaded here, so that its code counts as code of every such network."""
    SAMPLERS.load("dpmpp")
    return "dpmpp"


#: What is drawn has unit variance about its mean (`gain`).
DEVIATION = 1.0


class ImageToImage(nn.Module):
    """Draws a target from sources, which it sees beside its state (Saharia et al. 2022, section 3): p(target | source).

    Blocks of voxels are channels, as Haar coefficients: orthonormal, so that white noise stays white.  The network adds
    to what is known of a white target without it, in posterior deviations (Karras et al. 2022, table 1, as `Denoiser`
    has it).  Asked by `guess`, the same network sees no state and no noise, and what it gives is the target, or its
    logits: a plain regression, of the same size and cost.

    Parameters
    ----------
    settings
        What the study says of the network.
    image_shape
        Spatial.
    sources, targets
        Channels of both.
    """

    offset: Tensor
    scale: Tensor
    place: Tensor

    def __init__(self, settings: config.DrawingNetwork, image_shape: Sequence[int], sources: int, targets: int) -> None:
        super().__init__()
        dims = len(image_shape)
        self.stems = nn.ModuleList(Stem(dims, "haar") for _ in range(settings.block.bit_length() - 1))
        volume, grid = settings.block**dims, [n // settings.block for n in image_shape]
        self.blocks_shape, self.image_shape = (targets * volume, *grid), (targets, *image_shape)
        self.process = NoiseProcess.of(settings.denoiser)
        # How targets were standardised travels with the weights.
        self.register_buffer("offset", torch.zeros(1, *self.blocks_shape))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("place", coordinates(grid)[None], persistent=False)
        inputs, outputs = (sources + targets) * volume, targets * volume
        self.network: LocalNetwork | DiffusionModelUNet
        if settings.network == "resnet":
            width, blocks = settings.channels[0], settings.num_res_blocks
            self.network = LocalNetwork(dims, inputs, outputs, 0, width, blocks)
        else:
            self.network = DiffusionModelUNet(
                dims,
                inputs + dims,
                outputs,
                num_res_blocks=settings.num_res_blocks,
                channels=settings.channels,
                attention_levels=[False] * len(settings.channels),
                norm_num_groups=settings.denoiser.norm_num_groups,
                num_head_channels=settings.denoiser.num_head_channels,
            )

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [self.network]

    @property
    def standardisation(self) -> Standardisation[Tensor]:
        """From blocks of targets to what is drawn."""
        return Standardisation(self.offset, self.scale)

    def in_blocks(self, images: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, c * block**d, *blocks)."""
        for stem in self.stems:
            images = stem(images)
        return dense(images)

    def in_voxels(self, blocks: Tensor) -> Tensor:
        """The inverse of `in_blocks`."""
        for stem in reversed(self.stems):
            assert isinstance(stem, Stem)
            blocks = stem.inverse(blocks)
        return blocks

    def told(self, sources: Tensor) -> Tensor:
        """Sources (b, s, *spatial) in [0, 1] as the network sees them, (b, s * block**d, *blocks)."""
        return self.in_blocks(sources * 2.0 - 1.0)

    def forward(self, sources: Tensor, x: Tensor | None = None, timesteps: Tensor | None = None) -> Tensor:
        """The prediction from a state x (b, ., *blocks) at timesteps (b,), float32 and shaped as x; without a state,
        `guess`.
        """
        return self.guess(sources) if x is None or timesteps is None else self.predict(self.told(sources), x, timesteps)

    def predict(self, told: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """As `forward`, of `told` sources."""
        alpha, sigma = (a.float().reshape(-1, *[1] * (x.ndim - 1)) for a in self.process.alpha_sigma(timesteps))
        seen = x * (alpha.square() + sigma.square()).rsqrt()  # of unit variance
        power = alpha.square() + sigma.square()
        known = self.process.target(x * alpha / power, x * sigma / power, timesteps)
        return known + self.gain(timesteps, x.ndim) * self._network(told, seen, timesteps)

    def gain(self, timesteps: Tensor, ndim: int) -> Tensor:
        """What a unit of the network's output adds to the prediction, float32 (b, 1, ...) with `ndim` axes."""
        return gain(self.process, DEVIATION, timesteps, ndim)

    def guess(self, sources: Tensor) -> Tensor:
        """The target at once, or logits of it, float32 (b, targets, *spatial)."""
        told = self.told(sources)
        level = sources.new_full((len(sources),), self.process.last_timestep)
        return self.in_voxels(self._network(told, told.new_zeros(len(told), *self.blocks_shape), level)).float()

    def _network(self, told: Tensor, seen: Tensor, timesteps: Tensor) -> Tensor:
        place = self.place.to(seen.dtype).expand(len(seen), *self.place.shape[1:])
        if isinstance(self.network, LocalNetwork):
            alpha, sigma = self.process.alpha_sigma(timesteps)
            nothing = seen.new_zeros(len(seen), 0)
            return self.network(torch.cat([seen, told], 1), place, sigma.log() - alpha.log(), nothing).float()
        made: Tensor = self.network(dense(torch.cat([seen, told, place], 1)), timesteps.float())
        return made.float()

    def draw(
        self, sources: Tensor, noise: Tensor, num_inference_steps: int, guess: Tensor | None = None, start: float = 1.0
    ) -> Tensor:
        """Draws, float32 (b, targets, *spatial), from -1 to 1 but for what a network overshoots.

        Parameters
        ----------
        sources
            (b, s, *spatial) in [0, 1].
        noise
            Standard normal, (b, targets, *spatial): all that is random in it.
        num_inference_steps
            Evaluations of a full run.
        guess, start
            Where draws begin: at this share of the levels, from a guess from -1 to 1 (Guo et al. 2022); from noise
            alone without.
        """
        state, first = self.in_blocks(noise), None
        if guess is not None:
            full = levels_of(sampler(), self.process, num_inference_steps).timesteps
            first = full[min(len(full) - 1, round((1.0 - start) * len(full)))]
            level = torch.full((len(state),), first, dtype=torch.float64, device=state.device)
            state = self.process.add_noise(self.standardisation(self.in_blocks(guess)), state, level)
        drawn = sample(
            lambda x, timesteps, condition: self.predict(condition.maps[SOURCE], dense(x), timesteps),
            state,
            Condition(state.new_zeros(len(state), 0), {SOURCE: self.told(sources)}),
            self.process,
            sampler(),
            num_inference_steps=num_inference_steps,
            start=first,
        )
        return self.in_voxels(self.standardisation.inverse(drawn)).float()


def card_of(settings: config.ImageToImage, image_shape: Sequence[int], sources: int, targets: int) -> dict[str, Any]:
    """What it takes to build a network anew."""
    kept = ("block", "network", "channels", "num_res_blocks", "levels")
    return {
        "settings": settings.model_dump(mode="json", include=set(kept)),
        "image_shape": list(image_shape),
        "sources": sources,
        "targets": targets,
    }


def load_image_to_image(folder: Path, weights: str, card: str) -> tuple[ImageToImage, Mapping[str, Any]]:
    """A trained network of a folder, in evaluation mode on the CPU, and its card."""
    said = read_json(folder / card)
    settings = config.ImageToImage.model_validate(said["settings"])
    model = ImageToImage(settings, said["image_shape"], said["sources"], said["targets"])
    load_weights(model, folder, said, weights)
    return model, said
