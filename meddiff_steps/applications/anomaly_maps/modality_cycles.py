"""A scan translated to another contrast and back, by networks that know healthy tissue alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.applications.anomaly_maps._tiles import tiles_drawn
from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Mapper, Scan, Translations
from meddiff_steps.compute.device import to_channels_last, to_device
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import NETWORK, OF_IMAGE_TO_IMAGE
from meddiff_steps.diffusion.repaint import KnownPart, OneStep
from meddiff_steps.diffusion.sampling import levels_of
from meddiff_steps.models.image_to_image import ImageToImage, load_image_to_image, sampler

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ENTRY = {
    "order": 8,
    "summary": "The scan translated to another contrast, and tile after tile drawn again from that, given all others "
    "as they are",
    "source": "Liang et al. 2023 (MMCCD), whose diffusion is trained with masks; here it is told the rest by RePaint "
    "(Lugmayr et al. 2022)",
    "needs": ["two contrasts", "translation.cycle"],
    "cost": "twice num_inference_steps passes of the translation network, of `samples` images, for every tile",
}


@dataclass(frozen=True)
class Cycle:
    """Networks of healthy tissue.

    Attributes
    ----------
    forward
        Foretells other contrasts of a scan, at once.
    back
        A diffusion that draws the scan from these.
    fabric
        What both are on.
    """

    forward: ImageToImage
    back: ImageToImage
    fabric: Fabric

    @classmethod
    def load(cls, given: Translations) -> Self:
        """Of the folders that `translation_model` wrote.

        Raises
        ------
        UserError
            The way back starts elsewhere than the way there ends.
        """
        forward, there = load_image_to_image(given.forward, *OF_IMAGE_TO_IMAGE["regression"])
        back, again = load_image_to_image(given.back, *NETWORK)
        if (there["source"], there["target"]) != (again["target"], again["source"]):
            raise UserError(
                f"{given.back}: draws {again['target']} from {again['source']}, expected the way back of"
                f" {given.forward}, which draws {there['target']} from {there['source']}. Train both again."
            )
        for model in (forward, back):
            to_channels_last(model, len(model.image_shape) - 1)
            given.fabric.to_device(model)
        return cls(forward, back, given.fabric)

    @torch.no_grad()
    def translated(self, image: np.ndarray) -> np.ndarray:
        """Other contrasts of a scan (1, *spatial), as healthy tissue has them, float32 (t, *spatial) in [0, 1]."""
        with self.fabric.autocast():
            found: np.ndarray = self.forward.guess(to_device(image[None], self.fabric))[0].float().cpu().numpy()
        return ((found + 1.0) / 2.0).clip(0.0, 1.0)

    @torch.no_grad()
    def drawn(self, image: np.ndarray, contrasts: np.ndarray, settings: config.Anomaly, root: str) -> np.ndarray:
        """The scan (1, *spatial) in [0, 1] as healthy tissue of these contrasts (t, *spatial), the mean of draws.

        Every tile of `patch_cells` blocks a side is drawn given the contrasts and the rest of the scan.
        """
        model = self.back
        levels = levels_of(sampler(), model.process, settings.num_inference_steps)
        told = model.told(to_device(contrasts[None].astype(np.float32), self.fabric))
        blocks = model.in_blocks(to_device(image[None].astype(np.float32), self.fabric) * 2.0 - 1.0)

        def step_of(count: int) -> OneStep:
            source = told.expand(count, *told.shape[1:])

            def step(x: Tensor, begin: float, stop: float | None, guidance: KnownPart) -> Tensor:
                return model.sampled(source, x, settings.num_inference_steps, begin, stop, [guidance])

            return step

        with self.fabric.autocast():
            clean, cells = model.standardisation(blocks), settings.patch_cells
            made = tiles_drawn(clean, cells, settings.samples, step_of, levels, root, "cycles")
            healed = model.in_voxels(model.standardisation.inverse(made)).float()
        mean: np.ndarray = healed.mean(0).cpu().numpy()
        return ((mean + 1.0) / 2.0).clip(0.0, 1.0).astype(np.float32)


def build(context: Context) -> Mapper:
    if context.translations is None:
        raise UserError(
            "anomaly.methods: modality_cycles needs the networks of both ways (--translation and --back). Set"
            " translation.cycle: true, or leave the method out."
        )
    return cycled(Cycle.load(context.translations), context.settings)


def cycled(cycle: Cycle, settings: config.Anomaly) -> Mapper:
    """The method with these networks; its variant `measured` draws the scan from its own other contrasts."""

    def find(scan: Scan) -> Mapping[str, Finding]:
        ways = {"": cycle.translated(scan.image)}
        if scan.contrasts is not None:
            ways["measured"] = scan.contrasts
        found = {}
        for name, contrasts in ways.items():
            healed = cycle.drawn(scan.image, contrasts, settings, scan.root)
            found[name] = Finding((scan.image - healed)[0].astype(np.float32), healed)
        return found

    return find
