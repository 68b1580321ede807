"""Networks between two groups of images that are not paired: a guess and a diffusion of few large steps, both ways.

A diffusion needs images of the other group to draw from.  Of images that are not paired the guesses give them: what is
drawn in training is an image of one group from the guess of what it looks like in the other (SynDiff, Özbey et
al. 2023).  As its steps are large, where a network ends is not a normal distribution, and critics say what it should
look like (Xiao et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD, WEIGHTS
from meddiff_steps.diffusion.levels import halving_timesteps
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import convolution, coordinates, dense
from meddiff_steps.models.image_to_image import ImageToImage
from meddiff_steps.models.weights import load_weights

#: The two groups.  What is named after one gives images of that group.
Side = Literal["a", "b"]
OTHER: Mapping[Side, Side] = {"a": "b", "b": "a"}
#: Of a critic's activations below 0.
SLOPE = 0.2


def within(images: Tensor) -> Tensor:
    """Where any channel of images (b, c, *spatial) shows anything, bool (b, 1, *spatial)."""
    return (images > -1.0).any(1, keepdim=True)


class LargeSteps(nn.Module):
    """A few levels of noise of a variance-preserving process, of equal steps of arctan(sigma / alpha), and what lies
    between two of them.

    Level 0 is the noisiest, level `count` is clean.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, process: NoiseProcess, count: int) -> None:
        super().__init__()
        self.count = count
        timesteps = torch.from_numpy(halving_timesteps(process, count))
        alpha, sigma = process.alpha_sigma(timesteps)
        self.register_buffer("timesteps", timesteps, persistent=False)
        self.register_buffer("alpha", torch.cat([alpha, alpha.new_ones(1)]), persistent=False)
        self.register_buffer("sigma", torch.cat([sigma, sigma.new_zeros(1)]), persistent=False)

    def noisier(self, level: Tensor, x0: Tensor, noise: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """States at the next cleaner level and at `level` (b,), of the same chain, from clean x0 (b, ...) and two draws
        of noise.
        """
        alpha, sigma, shrink, added = self._of(level, x0.ndim)
        cleaner = alpha * x0 + sigma * noise
        return cleaner, shrink * cleaner + added.sqrt() * more

    def cleaner(self, level: Tensor, x: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """q(next state | state x at `level` (b,), x0), drawn with `noise` (Ho et al. 2020, equations 6 and 7)."""
        alpha, sigma, shrink, added = self._of(level, x.ndim)
        power = (shrink * sigma).square() + added
        mean = (alpha * added * x0 + shrink * sigma.square() * x) / power
        return mean + (added / power).sqrt() * sigma * noise

    def _of(self, level: Tensor, ndim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self.alpha[level + 1], self.sigma[level + 1]
        shrink = self.alpha[level] / alpha
        added = self.sigma[level].square() - (shrink * sigma).square()
        shape = (-1, *[1] * (ndim - 1))
        a, s, k, v = (values.float().reshape(shape) for values in (alpha, sigma, shrink, added))
        return a, s, k, v


class Unpaired(nn.Module):
    """Guesses and diffusions between two groups of images, which have values from -1 to 1.

    A guess begins as its source (the mean of its channels), with grey values of the mean and spread that those of the
    other group have within the head: what a critic does not ask for stays.

    Parameters
    ----------
    settings
        Of the networks, all four alike, and the number of steps.
    image_shape
        Spatial.
    channels
        Of the images of either group.
    """

    def __init__(self, settings: config.Unpaired, image_shape: Sequence[int], channels: Mapping[Side, int]) -> None:
        super().__init__()
        self.channels = dict(channels)

        def networks() -> nn.ModuleDict:
            made: dict[str, nn.Module] = {
                s: ImageToImage(settings, image_shape, channels[o], channels[s]) for s, o in OTHER.items()
            }
            return nn.ModuleDict(made)

        self.guesses, self.diffusions = networks(), networks()
        # Of grey values within the head, of each channel and of the mean of channels; they travel with the weights.
        for side, count in channels.items():
            self.register_buffer(f"mean_{side}", torch.zeros(count + 1))
            self.register_buffer(f"spread_{side}", torch.ones(count + 1))
        self.steps = LargeSteps(NoiseProcess.of(settings.denoiser), settings.num_inference_steps)

    @property
    def costly(self) -> list[nn.Module]:
        """What is worth compiling."""
        return [part for side in OTHER for net in (self.guesser(side), self.diffusion(side)) for part in net.costly]

    def guesser(self, side: Side) -> ImageToImage:
        """What guesses images of a group."""
        found = self.guesses[side]
        assert isinstance(found, ImageToImage)
        return found

    def diffusion(self, side: Side) -> ImageToImage:
        """What draws images of a group; it knows how they are standardised, too."""
        found = self.diffusions[side]
        assert isinstance(found, ImageToImage)
        return found

    def guess(self, side: Side, sources: Tensor) -> Tensor:
        """Images of a group at once, float32 (b, c, *spatial), from sources (b, s, *spatial) of the other."""
        return self.toned(side, sources) + self.guesser(side).guess((sources + 1.0) / 2.0)

    def toned(self, side: Side, sources: Tensor) -> Tensor:
        """Where a guess begins, float32 (b, c, *spatial)."""
        grey = sources.float().mean(1, keepdim=True)
        (here, width), (there, other) = self._tone(OTHER[side], grey.ndim), self._tone(side, grey.ndim)
        toned = (grey - here[:, -1:]) / width[:, -1:] * other[:, :-1] + there[:, :-1]
        return torch.where(within(sources), toned, -1.0)

    def measure_tone(self, side: Side, images: Iterable[Tensor]) -> None:
        """Keep the mean and spread of grey values of images, some (n, c, *spatial) at a time, within the head."""
        count, total, square = 0, torch.zeros(1).double(), torch.zeros(1).double()
        for some in images:
            every = torch.cat([some, some.mean(1, keepdim=True)], 1).movedim(1, 0)
            values = every[:, within(some)[:, 0]].double()
            count, total, square = count + values.shape[1], total + values.sum(1), square + values.square().sum(1)
        mean, spread = (getattr(self, f"{name}_{side}") for name in ("mean", "spread"))
        mean.copy_(total / count)
        spread.copy_((square / count - (total / count).square()).clamp_min(0).sqrt().clamp_min(1e-3))

    def _tone(self, side: Side, ndim: int) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *[1] * (ndim - 2))
        mean, spread = (getattr(self, f"{name}_{side}").reshape(shape) for name in ("mean", "spread"))
        return mean, spread

    def standardised(self, side: Side, images: Tensor) -> Tensor:
        """Images (b, c, *spatial) of a group as they are drawn, (b, ., *blocks)."""
        net = self.diffusion(side)
        return net.standardisation(net.in_blocks(images))

    def clean(self, side: Side, sources: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """What a diffusion takes a state x (b, ., *blocks) at `level` (b,) for, float32 as x, given sources.

        The network sees, and adds to, how far the state is from what `toned` sources would be there.
        """
        net, timesteps = self.diffusion(side), self.steps.timesteps[level]
        begun = self.standardised(side, self.toned(side, sources))
        beyond = dense(x - self.steps.alpha[level].float().reshape(-1, *[1] * (x.ndim - 1)) * begun)
        predicted = net.predict(net.told((sources + 1.0) / 2.0), beyond, timesteps.float())
        return begun + net.process.to_x0(predicted, beyond, timesteps)

    def images(self, side: Side, blocks: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        net = self.diffusion(side)
        return net.in_voxels(net.standardisation.inverse(blocks)).float()

    def forward(
        self, images: Mapping[Side, Tensor], states: Mapping[Side, Tensor], level: Tensor
    ) -> dict[str, dict[Side, Tensor]]:
        """All that a training looks at: `guess`, of either group from images of the other; `back`, guessed from these
        guesses; `clean`, what states of images at `level` (b,) are taken for, given the guesses of their other look.
        """
        guess = {side: self.guess(side, images[other]) for side, other in OTHER.items()}
        return {
            "guess": guess,
            "back": {side: self.guess(side, guess[other]) for side, other in OTHER.items()},
            "clean": {side: self.clean(side, guess[other], states[side], level) for side, other in OTHER.items()},
        }

    def draw(self, side: Side, sources: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """Draws of a group, float32 (b, c, *spatial), from sources of the other.

        Parameters
        ----------
        sources
            (b, s, *spatial) from -1 to 1.
        noise
            noise(i), standard normal (b, c, *spatial): 0 where all begins, and i + 1 what step i adds.
        """
        net = self.diffusion(side)
        x = net.in_blocks(noise(0))
        for i in range(self.steps.count):
            level = torch.full((len(x),), i, device=x.device)
            clean = self.clean(side, sources, x, level)
            last = i + 1 == self.steps.count
            x = clean if last else self.steps.cleaner(level, x, clean, net.in_blocks(noise(i + 1)))
        return self.images(side, x)


class Critic(nn.Module):
    """Convolutions that are not normalised, so that how far off a grey value is can be told however far it is.

    Parameters
    ----------
    spatial_dims
        2 or 3.
    inputs
        Channels.
    levels
        Of noise, which it is told.
    width, blocks
        Channels inside, and residual blocks.
    """

    def __init__(self, spatial_dims: int, inputs: int, levels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.first, self.last = convolution(spatial_dims, inputs, width), convolution(spatial_dims, width, 1)
        self.level = nn.Embedding(levels, width)
        self.inner, self.outer = (
            nn.ModuleList(convolution(spatial_dims, width, width) for _ in range(blocks)) for _ in range(2)
        )

    def forward(self, seen: Tensor, level: Tensor) -> Tensor:
        """seen (b, inputs, *blocks), level (b,) -> logits that a place is real, (b, 1, *blocks)."""
        hidden = self.first(seen) + self.level(level).reshape(len(seen), -1, *[1] * (seen.ndim - 2))
        for first, second in zip(self.inner, self.outer, strict=True):
            inner = second(functional.leaky_relu(first(functional.leaky_relu(hidden, SLOPE)), SLOPE))
            hidden = (hidden + inner) / math.sqrt(2)
        judged: Tensor = self.last(functional.leaky_relu(hidden, SLOPE))
        return judged


class Critics(nn.Module):
    """Four critics that look at standardised blocks of images, place by place: of either group, one at guesses, and one
    at states that a diffusion came to, beside the state that it came from.

    Parameters
    ----------
    settings
        Of the study.
    model
        What they judge.
    """

    place: Tensor

    def __init__(self, settings: config.Unpaired, model: Unpaired) -> None:
        super().__init__()
        networks: dict[str, nn.Module] = {}
        for side in OTHER:
            channels, *grid = model.diffusion(side).blocks_shape
            for kind, levels, seen in (("guess", 1, channels), ("clean", model.steps.count, 2 * channels)):
                size = (settings.critic_channels, settings.critic_blocks)
                networks[f"{kind}_{side}"] = Critic(len(grid), seen + len(grid), levels, *size)
        self.networks = nn.ModuleDict(networks)
        self.register_buffer("place", coordinates(grid)[None], persistent=False)

    def forward(self, kind: str, side: Side, seen: Tensor, level: Tensor) -> Tensor:
        """How real each place of `seen` (b, ., *blocks) looks, float32 (b, 1, *blocks): logits."""
        place = self.place.to(seen.dtype).expand(len(seen), *self.place.shape[1:])
        level = torch.zeros_like(level) if kind == "guess" else level
        judged: Tensor = self.networks[f"{kind}_{side}"](dense(torch.cat([seen, place], 1)), level)
        return judged.float()


def card_of(settings: config.Unpaired, model: Unpaired) -> dict[str, Any]:
    """What it takes to build the networks anew."""
    kept = ("block", "network", "channels", "num_res_blocks", "num_inference_steps")
    return {
        "settings": settings.model_dump(mode="json", include=set(kept)),
        "image_shape": list(model.diffusion("a").image_shape[1:]),
        "channels": model.channels,
    }


def load_unpaired(folder: Path) -> tuple[Unpaired, Mapping[str, Any]]:
    """Trained networks of a folder, in evaluation mode on the CPU, and their card."""
    said = read_json(folder / CARD)
    model = Unpaired(config.Unpaired.model_validate(said["settings"]), said["image_shape"], said["channels"])
    load_weights(model, folder, said, WEIGHTS)
    return model, said
