"""Models on disk: safetensors weights and a card that says what they are and how to build them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.core.files import read_json
from meddiff_steps.models.denoiser.unet import Denoiser
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.models.weights import load_weights


def load_autoencoder(weights: Path, card_path: Path) -> tuple[Autoencoder, dict[str, Any]]:
    """The trained first stage, in evaluation mode on the CPU, and its card."""
    card = read_json(card_path)
    model = Autoencoder(config.Autoencoder.model_validate(card["settings"]), len(card["image_shape"]) - 1)
    load_weights(model, weights, card)
    return model, card


@dataclass(frozen=True)
class LatentDiffusion:
    """A trained second stage with all that sampling needs.

    Attributes
    ----------
    denoiser
        In evaluation mode.
    settings
        The `diffusion` section it was trained with.
    latent_shape
        (c, *spatial).
    encoding
        How covariates become its input.
    """

    denoiser: Denoiser
    settings: config.Diffusion
    latent_shape: tuple[int, ...]
    encoding: CovariateEncoding

    @classmethod
    def load(cls, weights: Path, card_path: Path) -> Self:
        card = read_json(card_path)
        settings = config.Diffusion.model_validate(card["settings"])
        encoding = CovariateEncoding.from_json(card["encoding"])
        shape = tuple(card["latent_shape"])
        denoiser = Denoiser(settings, shape, encoding.level_counts, card["gaussian_rank"])
        load_weights(denoiser, weights, card)
        return cls(denoiser, settings, shape, encoding)
