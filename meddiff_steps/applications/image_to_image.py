"""Draws and guesses of one scan by trained networks, as the applications that draw images from images need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch

from meddiff_steps import config
from meddiff_steps.compute.device import to_channels_last, to_device
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import NETWORK, OF_IMAGE_TO_IMAGE
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.image_to_image import ImageToImage, load_image_to_image

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Drawer:
    """A diffusion and the same network trained without noise.

    Attributes
    ----------
    diffusion, regression
        Trained.
    pairs
        What they draw, from what.
    settings
        The study's section.
    root
        Of random numbers.
    digests
        SHA-256 of the weights.
    training
        What the cards say of it.
    """

    diffusion: ImageToImage
    regression: ImageToImage
    pairs: Pairs
    settings: config.ImageToImage
    root: str
    fabric: Fabric
    digests: dict[str, str]
    training: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(
        cls, folder: Path, shards: Shards, settings: config.ImageToImage, root: str, fabric: Fabric, key: str
    ) -> Self:
        """The networks of a folder that a step `..._model` wrote; `key` is the study's section.

        Raises
        ------
        UserError
            They were trained for other images.
        """
        models, cards = {}, {}
        for name, files in OF_IMAGE_TO_IMAGE.items():
            models[name], cards[name] = _loaded(folder, files, settings, fabric, key)
        said = cards["diffusion"]
        pairs = Pairs(
            shards,
            *(tuple(said["source"]), tuple(said["target"]), said["kind"], tuple(said["labels"])),
            said.get("missing", False),
        )
        facts = {name: _training(card) for name, card in cards.items()}
        return cls(
            *(models["diffusion"], models["regression"], pairs, settings, root, fabric),
            *({name: card["weights_sha256"] for name, card in cards.items()}, facts),
        )

    def with_other(self, name: Literal["diffusion", "regression"], folder: Path, key: str) -> Self:
        """The same with another network of either kind, that of a folder, whose digest and training alone are told;
        raises as `load`.
        """
        model, card = _loaded(folder, NETWORK, self.settings, self.fabric, key)
        told = {"digests": {name: card["weights_sha256"]}, "training": {name: _training(card)}}
        return replace(self, **{name: model}, **told)  # type: ignore[arg-type]

    @torch.no_grad()
    def guess(self, row: int, present: np.ndarray | None = None) -> np.ndarray:
        """What the network without noise says of a scan, (channels, *spatial): from -1 to 1, or logits; `present` as of
        `draws`.
        """
        with self.fabric.autocast():
            found: np.ndarray = self.regression.guess(self._sources(row, present))[0].cpu().numpy()
        return found

    @torch.no_grad()
    def draws(
        self,
        row: int,
        scan_id: str,
        guess: np.ndarray | None = None,
        start: float = 1.0,
        present: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draws of a scan, float32 (samples, channels, *spatial), about from -1 to 1.

        They are a batch of their own and their noise is keyed by scan and draw, so that they do not depend on what else
        is drawn.

        Parameters
        ----------
        guess, start
            As of `ImageToImage.draw`; guess (channels, *spatial) from -1 to 1.
        present
            Which sources, bool (s,), are looked at where any may be missing; None: those that the scan has.
        """
        count, model = self.settings.samples, self.diffusion
        keys = [seed_key(f"{self.root}/{scan_id}", i, 0, "noise") for i in range(count)]
        noise = to_device(batch_noise(keys, model.image_shape), self.fabric)
        begun = None if guess is None else to_device(np.repeat(guess[None], count, axis=0), self.fabric)
        with self.fabric.autocast():
            drawn = model.draw(self._sources(row, present), noise, self.settings.num_inference_steps, begun, start)
        found: np.ndarray = drawn.cpu().numpy()
        return found

    def _sources(self, row: int, present: np.ndarray | None) -> torch.Tensor:
        left = self.pairs.there([row])[0] if present is None else present[None]
        return to_device(self.pairs.hidden(self.pairs.sources([row]), left), self.fabric)


def _loaded(
    folder: Path, files: tuple[str, str], settings: config.ImageToImage, fabric: Fabric, key: str
) -> tuple[ImageToImage, Mapping[str, Any]]:
    model, said = load_image_to_image(folder, *files)
    for name, without in {"source": [], "target": [], "missing": False}.items():
        wanted, found = getattr(settings, name, without), said.get(name, without)
        if found != wanted:
            raise UserError(f"{key}.{name}: {wanted}, but {folder} was trained with {found}. Train it again.")
    to_channels_last(model, len(model.image_shape) - 1)
    fabric.to_device(model)
    return model, said


def _training(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a training cost, and what it saw."""
    settings, optimiser = card["settings"], card["optimiser"]
    said = {"steps": optimiser["steps"], "batch_size": optimiser["batch_size"], "scans": card["scans"]["train"]}
    said |= {"patch": settings.get("patch"), "coordinates": settings.get("coordinates", True)}
    return said | {name: card.get(name) for name in ("parameters", "kept_for_gradients_bytes")}
