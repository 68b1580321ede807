"""Images of one group as those of another, by networks that saw no pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.compute.device import to_channels_last, to_device
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.models.unpaired import Unpaired, load_unpaired

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Translator:
    """Trained networks, from group `a` to group `b`.

    Attributes
    ----------
    model
        On its device.
    root
        Of random numbers.
    digest
        SHA-256 of the weights.
    """

    model: Unpaired
    root: str
    fabric: Fabric
    digest: str

    @classmethod
    def load(
        cls, folder: Path, source: Sequence[str], target: Sequence[str], root: str, fabric: Fabric, key: str
    ) -> Self:
        """The networks of a folder; `key` is the study's section.

        Raises
        ------
        UserError
            They were trained for other images.
        """
        model, card = load_unpaired(folder)
        for side, wanted in (("a", source), ("b", target)):
            found = card["groups"][side]["columns"]
            if found != list(wanted):
                raise UserError(f"{key}: {list(wanted)}, but {folder} was trained with {found}. Train it again.")
        to_channels_last(model, len(card["image_shape"]))
        fabric.to_device(model)
        return cls(model, root, fabric, card["weights_sha256"])

    @torch.no_grad()
    def guess(self, images: np.ndarray) -> np.ndarray:
        """What the guessing network makes of images (n, s, *spatial), float32 (n, c, *spatial); all in [0, 1]."""
        with self.fabric.autocast():
            return _grey(self.model.guess("b", self._told(images)))

    @torch.no_grad()
    def draws(self, images: np.ndarray, scan_ids: Sequence[str], samples: int) -> np.ndarray:
        """Draws of images (n, s, *spatial), float32 (n, samples, c, *spatial); all in [0, 1].

        A scan's draws are a batch of their own, keyed by scan, draw and step: they do not depend on other scans.
        """
        found = []
        for image, scan in zip(images, scan_ids, strict=True):
            shape = (self.model.channels["b"], *image.shape[1:])

            def noise(step: int, scan: str = scan, shape: tuple[int, ...] = shape) -> Tensor:
                stream = f"steps/{step - 1}" if step else "noise"
                keys = [seed_key(f"{self.root}/{scan}", draw, 0, stream) for draw in range(samples)]
                return to_device(batch_noise(keys, shape), self.fabric)

            with self.fabric.autocast():
                found.append(_grey(self.model.draw("b", self._told(np.repeat(image[None], samples, 0)), noise)))
        return np.stack(found)

    def _told(self, images: np.ndarray) -> Tensor:
        return to_device((images * 2.0 - 1.0).astype(np.float32), self.fabric)


def _grey(images: Tensor) -> np.ndarray:
    found: np.ndarray = ((images + 1.0) / 2.0).clamp(0.0, 1.0).float().cpu().numpy()
    return found
