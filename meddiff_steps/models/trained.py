"""The trained model: one folder on disk, one object in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.compilation import cast_weights, speed_up
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.core.files import read_json
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.diffusion.inversion import Inversion, invert
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.first_stage.base import Posterior, build
from meddiff_steps.models.weights import CARD, load_weights, save_model

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


def load_first_stage(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The trained `FirstStage` of a folder, in evaluation mode on the CPU, and its card."""
    card = read_json(folder / CARD)
    model = build(config.Autoencoder.model_validate(card["settings"]), len(card["image_shape"]) - 1)
    load_weights(model, folder, card)
    return model, card


@dataclass(frozen=True)
class DenoiserCard:
    """What it takes to build a denoiser anew, and what goes in.

    Attributes
    ----------
    settings
        The `diffusion` section it was trained with.
    latent_shape
        (c, *spatial).
    encoding
        How covariates become numbers.
    rank
        Components of its `LatentGaussian`.
    maps, tokens
        Channels of every map and width of every kind of token that it is told.
    """

    settings: config.Diffusion
    latent_shape: tuple[int, ...]
    encoding: CovariateEncoding
    rank: int
    maps: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "latent_shape": list(self.latent_shape),
            "gaussian_rank": self.rank,
            "encoding": self.encoding.to_json(),
            "maps": dict(self.maps),
            "tokens": dict(self.tokens),
        }

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> Self:
        return cls(
            config.Diffusion.model_validate(card["settings"]),
            tuple(card["latent_shape"]),
            CovariateEncoding.from_json(card["encoding"]),
            card["gaussian_rank"],
            card.get("maps", {}),
            card.get("tokens", {}),
        )

    def build(self) -> Denoiser:
        """The denoiser with fresh weights."""
        levels = self.encoding.level_counts
        return Denoiser(self.settings, self.latent_shape, levels, self.rank, self.maps, self.tokens)


def save_first_stage(stage: Any, folder: Path, image_shape: Sequence[int], facts: Mapping[str, Any]) -> None:
    """Write weights and card of a first stage; `facts` are what was measured, and on what."""
    save_model(stage, folder, {"image_shape": list(image_shape), **facts})


def save_denoiser(denoiser: torch.nn.Module, made: DenoiserCard, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write weights and card of a denoiser; `facts` are what was measured, and on what."""
    save_model(denoiser, folder, {**made.to_json(), **facts})


def load_denoiser(folder: Path) -> tuple[Denoiser, DenoiserCard, dict[str, Any]]:
    """The trained denoiser of a folder, in evaluation mode on the CPU, how it was made, and its card."""
    card = read_json(folder / CARD)
    made = DenoiserCard.from_json(card)
    denoiser = made.build()
    load_weights(denoiser, folder, card)
    return denoiser, made, card


class TrainedModel:
    """Both stages on one device, and all that lies between images, latents, covariates and noise.

    Latents are those that the diffusion model works on: of mean 0 at every place and of unit spread.  They are what
    `encode` gives, `sample` makes and `decode` takes; nobody else standardises.

    Parameters
    ----------
    first_stage
        A `FirstStage`, trained.
    denoiser, card
        Trained, and how it was made.
    fabric
        Device and precision.
    compute
        The study's section; without it nothing is compiled.
    digests
        SHA-256 of the weights by stage, where they came from files.

    Raises
    ------
    UserError
        The study wants networks compiled, and this machine cannot.
    """

    def __init__(
        self,
        first_stage: Any,
        denoiser: Denoiser,
        card: DenoiserCard,
        fabric: Fabric,
        compute: config.Compute | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.first_stage, self.denoiser, self.card, self.fabric = first_stage, denoiser, card, fabric
        self.encoding, self.latent_shape, self.digests = card.encoding, card.latent_shape, dict(digests or {})
        self.process = NoiseProcess.of(card.settings)
        self.spatial_dims = len(card.latent_shape) - 1
        for network in (denoiser, first_stage):
            to_channels_last(network, self.spatial_dims)
            fabric.to_device(network)
        networks = [*denoiser.costly, first_stage.costly["decoder"]]
        cast_weights(networks, fabric)
        #: Whether the networks are compiled.
        self.compiled = compute is not None and speed_up(networks, compute, fabric, training=False)
        on_gpu = fabric.device.type == "cuda"
        self._graphs = self.compiled and on_gpu and compute is not None and compute.cuda_graphs

    @classmethod
    def load(cls, autoencoder: Path, diffusion: Path, fabric: Fabric, compute: config.Compute | None = None) -> Self:
        """The model of two folders, each with model.safetensors and card.json.

        Raises
        ------
        UserError
            Weights or a card are missing, do not belong together, or are of another version's network.
        """
        first_stage, first_card = load_first_stage(autoencoder)
        denoiser, made, card = load_denoiser(diffusion)
        digests = {"autoencoder": first_card["weights_sha256"], "diffusion": card["weights_sha256"]}
        return cls(first_stage, denoiser, made, fabric, compute, digests)

    @classmethod
    def of_study(cls, folder: Path, fabric: Fabric, compute: config.Compute | None = None) -> Self:
        """The model of a folder with autoencoder/ and diffusion/: a study's results, or models that were released."""
        return cls.load(folder / "autoencoder", folder / "diffusion", fabric, compute)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(1, *spatial)."""
        return (1, *(n * self.first_stage.downsampling for n in self.latent_shape[1:]))

    @property
    def digest(self) -> str:
        """SHA-256 that stands for both weights, in the order of the stages."""
        return hashlib.sha256("".join(self.digests[name] for name in sorted(self.digests)).encode()).hexdigest()

    # ---------------------------------------------------------------------------------------------- images

    @torch.no_grad()
    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        """Most probable latents, standardised, (b, c, *spatial), of images (b, 1, *spatial) in [0, 1]."""
        with self.fabric.autocast():
            posterior: Posterior = self.first_stage.encode(self._inside(images))
        return self.denoiser.standardise(posterior.mode())

    @torch.no_grad()
    def decode(self, latents: Tensor, noise: Tensor | None = None, slab: int | None = None) -> Tensor:
        """Images of final grey levels, float32 (b, 1, *spatial) in [0, 1], from standardised latents; see
        `FirstStage`.
        """
        z = self._inside(self.denoiser.latents(latents))
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self.fabric.autocast():
            return self.first_stage.decode(z, noise, slab)

    # ------------------------------------------------------------------------------------------- diffusion

    def condition(self, subjects: pd.DataFrame, maps: Mapping[str, Tensor] | None = None) -> Condition:
        """What the denoiser is told of `subjects`: a row each, a column per covariate in its own units, empty where
        missing.

        Raises
        ------
        UserError
            A column is missing, or a value is outside what the study declared.
        """
        return Condition(to_device(self.encoding.encode(subjects), self.fabric), maps or {})

    def denoise(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The network's prediction, (b, c, *spatial); see `diffusion.conditioning.Denoiser`."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the last result may be overwritten: it was copied
        with self.fabric.autocast():
            predicted = self.denoiser(self._inside(x), timesteps, condition)
        return predicted.clone() if self._graphs else predicted

    def sample(
        self,
        x: np.ndarray | Tensor,
        condition: Condition,
        settings: config.Generate,
        *,
        start: float | None = None,
        stop: float | None = None,
        guidance: Sequence[Guidance] = (),
        step_noise: Callable[[int], Tensor] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Standardised latents (b, c, *spatial) from noise, or from the state `x` at timestep `start`.

        Sampler, steps and guidance scale are those of the study's `generate` section; else as
        `diffusion.sampling.sample`.
        """
        return sample(
            self.denoise,
            self._inside(x),
            condition,
            self.process,
            settings.sampler,
            num_inference_steps=settings.num_inference_steps,
            start=start,
            stop=stop,
            guidance=guidance,
            guidance_scale=settings.guidance_scale,
            step_noise=step_noise,
            on_step=on_step,
        )

    def invert(
        self,
        latents: Tensor,
        condition: Condition,
        *,
        num_inference_steps: int | None = None,
        until: float | None = None,
        guidance_scale: float = 1.0,
        iterations: int = 3,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Inversion:
        """The states from which `ddim` (or `flow`) makes `latents`; as `diffusion.inversion.invert`."""
        return invert(
            self.denoise,
            latents,
            condition,
            self.process,
            num_inference_steps=num_inference_steps,
            until=until,
            guidance_scale=guidance_scale,
            iterations=iterations,
            on_step=on_step,
        )

    def _inside(self, values: np.ndarray | Tensor) -> Tensor:
        """On the device, in the layout that convolutions like."""
        tensor = to_device(values, self.fabric) if isinstance(values, np.ndarray) else self.fabric.to_device(values)
        return tensor.contiguous(memory_format=channels_last(self.spatial_dims))
