"""The trained model: one folder on disk, one object in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.compute.compilation import cast_weights, speed_up
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD, TONE
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.diffusion.inversion import Inversion, invert
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.student import Distilled, check_sampler
from meddiff_steps.models.drawing.base import DrawingDecoder
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import FirstStage, Posterior, build
from meddiff_steps.models.text_encoder import TextEncoder
from meddiff_steps.models.text_encoder import build as build_text_encoder
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.weights import load_weights, save_model

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


def load_first_stage(folder: Path) -> tuple[FirstStage, dict[str, Any]]:
    """The trained `FirstStage` of a folder, in evaluation mode on the CPU, and its card."""
    card = read_json(folder / CARD)
    channels, *spatial = card["image_shape"]
    model = build(config.Autoencoder.model_validate(card["settings"]), len(spatial), channels)
    load_weights(model, folder, card)
    return model, card


def load_decoder(folder: Path) -> tuple[DrawingDecoder, dict[str, Any]]:
    """The trained `DrawingDecoder` of a folder, in evaluation mode on the CPU, and its card."""
    card = read_json(folder / CARD)
    model = build_decoder(config.Decoder.model_validate(card["settings"]), card["image_shape"])
    load_weights(model, folder, card)
    return model, card


def save_tone(tone: ToneCurve, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the grey levels of what a model generates beside its weights; `facts` are what was measured."""
    weights, card = TONE
    save_model(tone, folder, facts, weights, card)


def load_tone(folder: Path) -> tuple[ToneCurve, dict[str, Any]]:
    """The curve that `save_tone` wrote, and its card."""
    weights, name = TONE
    card = read_json(folder / name)
    tone = ToneCurve()
    load_weights(tone, folder, card, weights)
    return tone, card


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
    variants
        Numbers that describe a variant of a training image.
    maps, tokens
        Channels of every map and width of every kind of token that it is told.
    few_step
        What it was distilled for, where it is a student.
    text
        How the encoder of its texts is built (`models.text_encoder.build`), where it was trained on texts.
    """

    settings: config.Diffusion
    latent_shape: tuple[int, ...]
    encoding: CovariateEncoding
    variants: int
    maps: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    few_step: Distilled | None = None
    text: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "latent_shape": list(self.latent_shape),
            "variants": self.variants,
            "encoding": self.encoding.to_json(),
            "maps": dict(self.maps),
            "tokens": dict(self.tokens),
            **({"few_step": self.few_step.to_json()} if self.few_step else {}),
            **({"text": dict(self.text)} if self.text else {}),
        }

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> Self:
        return cls(
            config.Diffusion.model_validate(card["settings"]),
            tuple(card["latent_shape"]),
            CovariateEncoding.from_json(card["encoding"]),
            card["variants"],
            card.get("maps", {}),
            card.get("tokens", {}),
            Distilled.from_json(card["few_step"]) if "few_step" in card else None,
            card.get("text"),
        )

    def build(self) -> Denoiser:
        """The denoiser with fresh weights, without the encoder of texts, which is not trained with it."""
        levels, steps = self.encoding.level_counts, self.few_step.steps if self.few_step else None
        names = self.encoding.names
        return Denoiser(self.settings, self.latent_shape, levels, self.variants, self.maps, self.tokens, steps, names)


def load_text_encoder(folder: Path) -> tuple[TextEncoder, dict[str, Any]]:
    """The encoder of texts of a folder, on the CPU, and its card."""
    card = read_json(folder / CARD)
    encoder = build_text_encoder(card["encoder"])
    load_weights(encoder, folder, card)
    encoder.check(folder)
    return encoder, card


def save_image_network(
    network: torch.nn.Module, folder: Path, image_shape: Sequence[int], facts: Mapping[str, Any]
) -> None:
    """Write weights and card of a first stage or a drawing decoder; `facts` are its settings, what was measured, and on
    what.
    """
    save_model(network, folder, {"image_shape": list(image_shape), **facts})


def save_denoiser(denoiser: torch.nn.Module, made: DenoiserCard, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write weights and card of a denoiser; `facts` are what was measured, and on what."""
    save_model(denoiser, folder, {**made.to_json(), **facts})


def load_denoiser(folder: Path) -> tuple[Denoiser, DenoiserCard, dict[str, Any]]:
    """The trained denoiser of a folder, in evaluation mode on the CPU, how it was made, and its card."""
    card = read_json(folder / CARD)
    made = DenoiserCard.from_json(card)
    denoiser = made.build()
    if made.text is not None:
        denoiser.text = build_text_encoder(made.text)
    load_weights(denoiser, folder, card)
    if denoiser.text is not None:
        denoiser.text.check(folder)
    return denoiser, made, card


class TrainedModel:
    """All stages on one device, and all that lies between images, latents, covariates and noise.

    Latents are those that the diffusion model works on: of mean 0 at every place and of unit spread.  They are what
    `encode` gives, `sample` makes and `decode` takes; nobody else standardises.

    Parameters
    ----------
    first_stage
        A `FirstStage`, trained.
    denoiser, card
        Trained, and how it was made.
    decoder
        A `DrawingDecoder`, trained; None where images are as the first stage decodes them.
    tone
        The grey levels of what is generated.
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
        first_stage: FirstStage,
        denoiser: Denoiser,
        card: DenoiserCard,
        fabric: Fabric,
        compute: config.Compute | None = None,
        digests: Mapping[str, str] | None = None,
        *,
        decoder: DrawingDecoder | None = None,
        tone: ToneCurve | None = None,
    ) -> None:
        self.first_stage, self.denoiser, self.card, self.fabric = first_stage, denoiser, card, fabric
        self.decoder, self.tone = decoder, ToneCurve() if tone is None else tone
        self.encoding, self.latent_shape, self.digests = card.encoding, card.latent_shape, dict(digests or {})
        self.process = NoiseProcess.of(card.settings)
        self.spatial_dims = len(card.latent_shape) - 1
        for network in (denoiser, first_stage, self.tone, *([decoder] if decoder else [])):
            to_channels_last(network, self.spatial_dims)
            fabric.to_device(network)
        networks = [*denoiser.costly, first_stage.costly["decoder"], *(decoder.costly if decoder else [])]
        cast_weights(networks, fabric)
        #: Whether the networks are compiled.
        self.compiled = compute is not None and speed_up(networks, compute, fabric, training=False)
        on_gpu = fabric.device.type == "cuda"
        self._graphs = self.compiled and on_gpu and compute is not None and compute.cuda_graphs

    @classmethod
    def load(
        cls,
        autoencoder: Path,
        diffusion: Path,
        fabric: Fabric,
        compute: config.Compute | None = None,
        *,
        decoder: Path | None = None,
        toned: bool = True,
    ) -> Self:
        """The model of two folders, or of three with a drawing decoder, each with model.safetensors and card.json.

        The folder `diffusion` also has the grey levels of what it generates; `toned` says whether they are wanted.

        Raises
        ------
        UserError
            Weights or a card are missing, do not belong together, or are of another version's network.
        """
        first_stage, first_card = load_first_stage(autoencoder)
        denoiser, made, card = load_denoiser(diffusion)
        cards = {"autoencoder": first_card, "diffusion": card}
        drawing = tone = None
        if decoder is not None:
            drawing, cards["decoder"] = load_decoder(decoder)
        if toned:
            tone, cards["tone"] = load_tone(diffusion)
        digests = {name: read["weights_sha256"] for name, read in cards.items()}
        return cls(first_stage, denoiser, made, fabric, compute, digests, decoder=drawing, tone=tone)

    @classmethod
    def of_study(cls, folder: Path, fabric: Fabric, compute: config.Compute | None = None) -> Self:
        """The model of a folder with autoencoder/, diffusion/ and maybe decoder/.

        That is the folder of a study's results, or of models that were released.
        """
        decoder = folder / "decoder"
        found = decoder if (decoder / CARD).is_file() else None
        return cls.load(folder / "autoencoder", folder / "diffusion", fabric, compute, decoder=found)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(1, *spatial); of a model of label maps, with as many channels as they are encoded in."""
        return (self.first_stage.image_channels, *(n * self.first_stage.downsampling for n in self.latent_shape[1:]))

    @property
    def digest(self) -> str:
        """SHA-256 that stands for all weights, in the order of the stages' names."""
        return hashlib.sha256("".join(self.digests[name] for name in sorted(self.digests)).encode()).hexdigest()

    # ---------------------------------------------------------------------------------------------- images

    @torch.no_grad()
    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        """Most probable latents, standardised, (b, c, *spatial), of images (b, 1, *spatial) in [0, 1]."""
        with self.fabric.autocast():
            posterior: Posterior = self.first_stage.encode(self._inside(images))
        return self.denoiser.standardise(posterior.mode())

    @torch.no_grad()
    def decode(
        self, latents: Tensor, noise: Tensor | None = None, *, drawing_steps: int = 10, slab: int | None = None
    ) -> Tensor:
        """Images of final grey levels, float32 (b, 1, *spatial) in [0, 1], from standardised latents.

        Parameters
        ----------
        latents
            (b, c, *spatial).
        noise
            Standard normal, (b, 1, *spatial): one draw of the drawing decoder.  Without it, or without a decoder, the
            mean of what the latents can mean.
        drawing_steps
            Of the drawing decoder.
        slab
            Planes that are decoded at a time, for less memory; the same but for rounding.
        """
        z = self._inside(self.denoiser.latents(latents))
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self.fabric.autocast():
            images = self.first_stage.decode(z, slab).clamp(0.0, 1.0)
            if noise is not None and self.decoder is not None:
                images = self.decoder.draw(images, self._inside(noise), drawing_steps, slab)
        return self.tone(images)

    def mean_images(self, latents: Tensor) -> Tensor:
        """What the first stage alone decodes, float32 (b, 1, *spatial), nominally in [0, 1]: neither drawn nor clipped,
        nor its grey levels changed, so that it can be differentiated with respect to standardised latents.
        """
        with self.fabric.autocast():
            return self.first_stage.decode(self._inside(self.denoiser.latents(latents))).float()

    @property
    def draws(self) -> bool:
        """Whether `decode` has a use for noise."""
        return self.decoder is not None

    # ------------------------------------------------------------------------------------------- diffusion

    def condition(self, subjects: pd.DataFrame, maps: Mapping[str, Tensor] | None = None) -> Condition:
        """What the denoiser is told of `subjects`: a row each, a column per covariate in its own units, empty where
        missing, and a column `text`, if it knows texts and there are some.

        Raises
        ------
        UserError
            A column is missing, or a value is outside what the study declared.
        """
        tokens: dict[str, Tensor] = {}
        encoder = self.denoiser.text
        if encoder is not None:
            texts = subjects[TEXT].tolist() if TEXT in subjects else [None] * len(subjects)
            tokens[TEXT] = to_device(encoder.batch(texts), self.fabric)
        return Condition(to_device(self.encoding.encode(subjects), self.fabric), maps or {}, tokens)

    def denoise(self, x: Tensor, timesteps: Tensor, condition: Condition, guide: bool = False) -> Tensor:
        """The network's prediction, or that of its less trained guide, (b, c, *spatial); see
        `diffusion.conditioning.Denoiser`.
        """
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the last result may be overwritten: it was copied
        with self.fabric.autocast():
            predicted = self.denoiser(self._inside(x), timesteps, condition, guide)
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
        `diffusion.sampling.sample`.  A student has the guidance in its weights and takes one pass per step.

        Raises
        ------
        UserError
            The model is a student that was distilled for something else, or the sampler is of students and it is none.
        """
        student = self.card.few_step
        check_sampler(student, settings)
        steps, guided = settings.num_inference_steps, student is None
        return sample(
            self.denoise,
            self._inside(x),
            condition,
            self.process,
            settings.sampler,
            num_inference_steps=student.num_inference_steps if student and steps is None else steps,
            start=start,
            stop=stop,
            guidance=guidance,
            guidance_scale=settings.guidance_scale if guided else 1.0,
            guidance_interval=settings.guidance_interval,
            guide=partial(self.denoise, guide=True) if guided and settings.guidance == "autoguidance" else None,
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
        """The states from which `ddim` (or `flow`) makes `latents`; as `diffusion.inversion.invert`.

        Raises
        ------
        UserError
            The model is a student, whose long steps cannot be taken back.
        """
        if self.card.few_step is not None:
            raise UserError("a student cannot be inverted. Give the folder of its teacher, diffusion/.")
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
