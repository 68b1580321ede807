"""A network that draws an image from other images of the same scan, or foretells it in one look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.device import full_float32
from meddiff_steps.core.files import read_json
from meddiff_steps.core.registries import SAMPLERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.diffusion.sampling import levels_of, sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import coordinates, dense
from meddiff_steps.models.denoiser.base import gain
from meddiff_steps.models.denoiser.resnet import LocalNetwork
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.slices import Slices, by_slice, network_of, stacked
from meddiff_steps.models.weights import load_weights, start_from

#: Name of what is given, among the maps of a condition.
SOURCE = "source"


def sampler() -> str:
    """What takes noise to an image; loaded here, so that its code counts as code of every such network."""
    SAMPLERS.load("dpmpp")
    return "dpmpp"


#: What is drawn has unit variance about its mean (`gain`).
DEVIATION = 1.0

#: The level at which a pretrained network is shown clean images, in deviations from the mean of the levels that it was
#: trained on: the cleanest of those that it saw often.
CLEANEST = -2.0

#: What of a card it takes to build a network anew.
BUILT_FROM = ("settings", "image_shape", "sources", "targets", "marks", "missing", "slices", "mean")


class ImageToImage(nn.Module):
    """Draws a target from sources, which it sees beside its state (Saharia et al. 2022, section 3): p(target | source).

    Blocks of voxels are channels, as Haar coefficients: orthonormal, so that white noise stays white.  The network adds
    to what is known of a white target without it, in posterior deviations (Karras et al. 2022, table 1, as `Denoiser`
    has it).  Asked by `guess`, the same network sees no state and no noise, and what it gives is the target, or its
    logits: a plain regression, of the same size and cost.

    It may be asked about patches (Bieder et al. 2023): of whole images at `corners`, in blocks.  A patch has the
    coordinates, and the mean, of its place in the whole.

    Parameters
    ----------
    settings
        What the study says of the network.
    image_shape
        Spatial, of whole images.
    sources, targets
        Channels of both.
    marks
        Where it is to mark something in the very images that it would draw (Rousseau et al. 2023): channels that it
        gives then.  It has no sources, and `guess` is asked with its targets, which take the place of the state.
    missing
        Sources may be NaN: they are not there.  The network is told which are, in a channel of each.
    slices
        Of volumes: how the network looks at their slices; blocks are then of voxels of one slice.
    mean
        A trained network of the same images, with the same blocks, whose `guess` is the mean of what is drawn: what is
        drawn then is what the target has beyond it (Mardani et al. 2023).  The network sees the guess, and does not
        change it.
    """

    offset: Tensor
    scale: Tensor
    place: Tensor

    def __init__(
        self,
        settings: config.DrawingNetwork,
        image_shape: Sequence[int],
        sources: int,
        targets: int,
        marks: int = 0,
        missing: bool = False,
        slices: Slices | None = None,
        mean: ImageToImage | None = None,
    ) -> None:
        super().__init__()
        dims, self.missing, self.slices = len(image_shape), missing, slices
        along = dims - (slices is not None)  # axes that blocks have
        self.stems = nn.ModuleList(Stem(along, "haar") for _ in range(settings.block.bit_length() - 1))
        volume = settings.block**along
        grid = [n // settings.block for n in image_shape[:along]] + list(image_shape[along:])
        self.blocks_shape, self.image_shape = (targets * volume, *grid), (targets, *image_shape)
        self.process, self.marks, self.levels = NoiseProcess.of(settings.denoiser), marks, settings.denoiser.levels
        # How targets were standardised travels with the weights.
        self.register_buffer("offset", torch.zeros(1, *self.blocks_shape))
        self.register_buffer("scale", torch.ones(()))
        placed = getattr(settings, "coordinates", True)
        self.register_buffer("place", coordinates(grid)[None] * placed, persistent=False)
        self.mean = mean if mean is None else mean.requires_grad_(False)
        inputs = (sources + targets * (1 if mean is None else 2)) * volume + missing * sources
        outputs = (marks or targets) * volume
        self.network: LocalNetwork | DiffusionModelUNet
        width, blocks = settings.channels[0], settings.num_res_blocks
        if slices is not None:
            self.network = network_of(slices, inputs, outputs, width, blocks)
        elif settings.network == "resnet":
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
        return [self.network, *([] if self.mean is None else self.mean.costly)]

    @property
    def standardisation(self) -> Standardisation[Tensor]:
        """From blocks of whole targets to what is drawn, of a network without a `mean`."""
        assert self.mean is None, "the mean is that of each image: standardisation_of"
        return Standardisation(self.offset, self.scale)

    def standardisation_of(self, told: Tensor, corners: Tensor | None = None) -> Standardisation[Tensor]:
        """The same of what belongs to `told` sources; of patches `corners` as of `forward`."""
        if self.mean is not None:
            return Standardisation(told[:, -self.blocks_shape[0] :], self.scale)
        return Standardisation(part(self.offset, corners, told.shape[2:]), self.scale)

    def start(self, base: ImageToImage, key: str) -> None:
        """Take over the weights of another network: where this one marks, all but those of the last layer; layers
        across slices, which the other lacks, stay as they are.

        Raises
        ------
        UserError
            It is another network; `key` is the study's section.
        """
        head = "network.last." if isinstance(self.network, LocalNetwork) else "network.out.2."
        given = base.state_dict()
        mine = {
            name: value
            for name, value in self.state_dict().items()
            if (self.marks and name.startswith(head)) or (".across." in name and name not in given)
        }
        start_from(self, base, key, {**given, **mine})

    @full_float32()
    def in_blocks(self, images: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, c * block**d, *blocks), float32 whatever the precision of the networks."""
        batch, images = len(images), images.float()
        if self.slices is not None:
            images = by_slice(images)
        for stem in self.stems:
            images = stem(images)
        return dense(images if self.slices is None else stacked(images, batch))

    @full_float32()
    def in_voxels(self, blocks: Tensor) -> Tensor:
        """The inverse of `in_blocks`."""
        batch, blocks = len(blocks), blocks.float()
        if self.slices is not None:
            blocks = by_slice(blocks)
        for stem in reversed(self.stems):
            assert isinstance(stem, Stem)
            blocks = stem.inverse(blocks)
        return blocks if self.slices is None else stacked(blocks, batch)

    def told(self, sources: Tensor, corners: Tensor | None = None) -> Tensor:
        """Sources (b, s, *spatial) in [0, 1] as the network sees them, (b, s * block**d, *blocks); where they may be
        missing, those that are not there are grey, and s channels say which are.  The last channels are the guess of
        `mean`, where there is one.  `corners` as of `forward`.
        """
        there = sources.isfinite().flatten(2).all(2)[(..., *[None] * (sources.ndim - 2))] if self.missing else None
        blocks = self.in_blocks((sources if there is None else torch.where(there, sources, 0.5)) * 2.0 - 1.0)
        found = [blocks]
        if there is not None:
            found.append(there.to(blocks.dtype).expand(*there.shape[:2], *blocks.shape[2:]))
        if self.mean is not None:
            with torch.no_grad():
                found.append(self.in_blocks(self.mean.guess(sources, corners)))
        return torch.cat(found, 1)

    def forward(
        self,
        told: Tensor,
        x: Tensor | None = None,
        timesteps: Tensor | None = None,
        corners: Tensor | None = None,
    ) -> Tensor:
        """Of `told` sources, the prediction from a state x (b, ., *blocks) at timesteps (b,), float32 and shaped as x;
        without a state, `guess`.  Of patches `corners` (b, d), the whole images' blocks where they begin.
        """
        if x is None or timesteps is None:
            return self._guess(told, corners)
        return self.predict(told, x, timesteps, corners)

    def predict(self, told: Tensor, x: Tensor, timesteps: Tensor, corners: Tensor | None = None) -> Tensor:
        """The prediction from a state, as of `forward`."""
        alpha, sigma = (a.float().reshape(-1, *[1] * (x.ndim - 1)) for a in self.process.alpha_sigma(timesteps))
        seen = x * (alpha.square() + sigma.square()).rsqrt()  # of unit variance
        power = alpha.square() + sigma.square()
        known = self.process.target(x * alpha / power, x * sigma / power, timesteps)
        return known + self.gain(timesteps, x.ndim) * self._network(told, seen, timesteps, corners)

    def gain(self, timesteps: Tensor, ndim: int) -> Tensor:
        """What a unit of the network's output adds to the prediction, float32 (b, 1, ...) with `ndim` axes."""
        return gain(self.process, DEVIATION, timesteps, ndim)

    def guess(self, sources: Tensor, corners: Tensor | None = None) -> Tensor:
        """The target at once, or logits of it, float32 (b, targets or marks, *spatial); sources as of `told`."""
        return self._guess(self.told(sources, corners), corners)

    def _guess(self, told: Tensor, corners: Tensor | None) -> Tensor:
        level = self.process.last_timestep
        seen = told.new_zeros(len(told), self.blocks_shape[0], *told.shape[2:])
        if self.marks:
            seen, told = self.standardisation_of(told, corners)(told), told[:, :0]
            level = float(self.process.timesteps_at(np.array(self.levels.mean + CLEANEST * self.levels.deviation)))
        timesteps = torch.full((len(told),), level, device=told.device)
        return self.in_voxels(self._network(told, seen, timesteps, corners))

    def _network(self, told: Tensor, seen: Tensor, timesteps: Tensor, corners: Tensor | None) -> Tensor:
        place = part(self.place, corners, seen.shape[2:]).to(seen.dtype)
        place = place.expand(len(seen), *place.shape[1:])
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
            (b, s, *spatial) in [0, 1]; or (1, s, *spatial), those of all draws.
        noise
            Standard normal, (b, targets, *spatial): all that is random in it.
        num_inference_steps
            Evaluations of a full run.
        guess, start
            Where draws begin: at this share of the levels, from a guess from -1 to 1 (Guo et al. 2022); from noise
            alone without.
        """
        state, first, told = self.in_blocks(noise), None, self.told(sources)
        told = told.expand(len(noise), *told.shape[1:])
        standardisation = self.standardisation_of(told)
        if guess is not None:
            full = levels_of(sampler(), self.process, num_inference_steps).timesteps
            first = full[min(len(full) - 1, round((1.0 - start) * len(full)))]
            level = torch.full((len(state),), first, dtype=torch.float64, device=state.device)
            state = self.process.add_noise(standardisation(self.in_blocks(guess)), state, level)
        drawn = self.sampled(told, state, num_inference_steps, first)
        return self.in_voxels(standardisation.inverse(drawn))

    def sampled(
        self,
        told: Tensor,
        state: Tensor,
        num_inference_steps: int,
        start: float | None = None,
        stop: float | None = None,
        guidance: Sequence[Guidance] = (),
    ) -> Tensor:
        """Standardised blocks, or a state on the way to them, (b, ., *blocks), from a state and `told` sources; all
        else as of `diffusion.sampling.sample`.
        """
        return sample(
            lambda x, timesteps, condition: self.predict(condition.maps[SOURCE], dense(x), timesteps),
            state,
            Condition(state.new_zeros(len(state), 0), {SOURCE: told}),
            self.process,
            sampler(),
            num_inference_steps=num_inference_steps,
            start=start,
            stop=stop,
            guidance=guidance,
        )


def part(whole: Tensor, corners: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Of one whole (1, c, *blocks) what lies at `corners` (b, d), (b, c, *shape); the whole where there are none."""
    if corners is None:
        return whole
    dims = len(shape)
    along: list[Tensor] = [
        (corners[:, axis, None] + torch.arange(n, device=corners.device)).reshape(
            -1, *(n if other == axis else 1 for other in range(dims))
        )
        for axis, n in enumerate(shape)
    ]
    return torch.stack([channel[tuple(along)] for channel in whole[0]], 1)


def card_of(
    settings: config.ImageToImage,
    image_shape: Sequence[int],
    sources: int,
    targets: int,
    marks: int = 0,
    missing: bool = False,
    slices: Slices | None = None,
    mean: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What it takes to build a network anew; `mean`: the card of the network that foretells the mean."""
    kept = ("block", "network", "channels", "num_res_blocks", "levels", "patch", "coordinates")
    return {
        "settings": settings.model_dump(mode="json", include=set(kept)),
        "image_shape": list(image_shape),
        "sources": sources,
        "targets": targets,
        **{"marks": marks, "missing": missing, "slices": slices},
        **({} if mean is None else {"mean": {name: value for name, value in mean.items() if name in BUILT_FROM}}),
    }


def build(said: Mapping[str, Any]) -> ImageToImage:
    """The network that a card tells of (`card_of`), with fresh weights."""
    settings = config.ImageToImage.model_validate(said["settings"])
    more = {name: said[name] for name in ("marks", "missing", "slices") if name in said}  # older cards lack them
    if "mean" in said:
        more["mean"] = build(said["mean"])
    return ImageToImage(settings, said["image_shape"], said["sources"], said["targets"], **more)


def load_image_to_image(folder: Path, weights: str, card: str) -> tuple[ImageToImage, Mapping[str, Any]]:
    """A trained network of a folder, in evaluation mode on the CPU, and its card."""
    said = read_json(folder / card)
    model = build(said)
    load_weights(model, folder, said, weights)
    return model, said
