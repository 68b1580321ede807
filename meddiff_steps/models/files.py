"""Models on disk: safetensors weights and a card that says what they are and how to build them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.errors import UserError
from meddiff_steps.files import atomic_path, read_json, write_json
from meddiff_steps.models.autoencoder import Autoencoder
from meddiff_steps.models.denoiser import Denoiser
from meddiff_steps.models.embedder import Embedder
from meddiff_steps.models.segmenter import Segmenter
from meddiff_steps.training.checkpoint import weights_digest


def save_model(module: nn.Module, weights: Path, card: Path, content: dict[str, Any]) -> None:
    """Write the weights and, last, the card with their digest: a card on disk means that its weights are whole."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic_path(weights) as path:
        save_file(tensors, path)
    parameters = sum(value.numel() for value in tensors.values())
    write_json(card, content | {"weights_sha256": weights_digest(tensors), "parameters": parameters})


def _load(module: nn.Module, weights: Path, card: dict[str, Any]) -> None:
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not readable as safetensors ({error}). Train again, or give the right file.") from None
    found = weights_digest(tensors)
    if found != card["weights_sha256"]:
        raise UserError(f"{weights}: its digest {found[:12]} is not the one its card names ({card['weights_sha256'][:12]}). Take both from the same training.")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights}: not the weights of this version's network ({reason}). Use the version that trained them, or train again.") from None
    module.requires_grad_(False).eval()


def load_autoencoder(weights: Path, card_path: Path) -> tuple[Autoencoder, dict[str, Any]]:
    """The trained first stage, in evaluation mode on the CPU, and its card."""
    card = read_json(card_path)
    model = Autoencoder(config.Autoencoder.model_validate(card["settings"]), len(card["image_shape"]) - 1)
    _load(model, weights, card)
    return model, card


def load_embedder(weights: Path, card_path: Path) -> Embedder:
    """The trained copy detector, in evaluation mode on the CPU."""
    card = read_json(card_path)
    model = Embedder(card["image_shape"][1:])
    _load(model, weights, card)
    return model


def load_segmenter(weights: Path, card_path: Path) -> tuple[Segmenter, dict[str, Any]]:
    """The trained segmenter, in evaluation mode on the CPU, and its card."""
    card = read_json(card_path)
    model = Segmenter(card["structures"], card["image_shape"][1:], card["channels"])
    _load(model, weights, card)
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
        _load(denoiser, weights, card)
        return cls(denoiser, settings, shape, encoding)
