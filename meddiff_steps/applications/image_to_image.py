"""Draws and guesses of one scan by trained networks, as the applications that draw images from images need them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

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
    """

    diffusion: ImageToImage
    regression: ImageToImage
    pairs: Pairs
    settings: config.ImageToImage
    root: str
    fabric: Fabric
    digests: dict[str, str]

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
        for name, (weights, card) in OF_IMAGE_TO_IMAGE.items():
            models[name], cards[name] = load_image_to_image(folder, weights, card)
            to_channels_last(models[name], len(models[name].image_shape) - 1)
            fabric.to_device(models[name])
        said = cards["diffusion"]
        missing = getattr(settings, "missing", False)
        asked = {"source": list(settings.source), "target": list(settings.target), "missing": missing}
        for name, wanted in asked.items():
            found = said.get(name, False)
            if found != wanted:
                raise UserError(f"{key}.{name}: {wanted}, but {folder} was trained with {found}. Train it again.")
        named = tuple(said["source"]), tuple(said["target"])
        pairs = Pairs(shards, *named, said["kind"], tuple(said["labels"]), missing)
        digests = {name: card["weights_sha256"] for name, card in cards.items()}
        return cls(models["diffusion"], models["regression"], pairs, settings, root, fabric, digests)

    def drawing_with(self, folder: Path) -> tuple[Self, str]:
        """The same with another diffusion, of this folder, and the digest of its weights."""
        model, card = load_image_to_image(folder, *NETWORK)
        to_channels_last(model, len(model.image_shape) - 1)
        self.fabric.to_device(model)
        return replace(self, diffusion=model), card["weights_sha256"]

    @torch.no_grad()
    def guess(self, row: int, present: np.ndarray | None = None) -> np.ndarray:
        """What the network without noise says of a scan, (channels, *spatial): from -1 to 1, or logits; `present` as of
        `draws`.
        """
        with self.fabric.autocast():
            found: np.ndarray = self.regression.guess(self._sources(row, 1, present))[0].cpu().numpy()
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
            drawn = model.draw(
                self._sources(row, count, present), noise, self.settings.num_inference_steps, begun, start
            )
        found: np.ndarray = drawn.cpu().numpy()
        return found

    def _sources(self, row: int, count: int, present: np.ndarray | None) -> torch.Tensor:
        left = self.pairs.there([row])[0] if present is None else present[None]
        sources = to_device(self.pairs.hidden(self.pairs.sources([row]), left), self.fabric)
        return sources.expand(count, *sources.shape[1:])
