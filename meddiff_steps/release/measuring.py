"""What is measured in a released image, beside what was asked for: covariates, and a label map.

Both are of the image as it is stored, and of one image at a time, so that whoever has the image and the instruments
gets the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.imaging.encoding import PICTURE_SCALE, VOLUME_SCALE, Grid
from meddiff_steps.instruments.predictors import Predictors, load_predictors
from meddiff_steps.provenance.ledger import MEASURED, SEGMENTED
from meddiff_steps.release.sealed import Sealed

if TYPE_CHECKING:
    from meddiff_steps.instruments.segmenter import Segmenter

#: Where a study keeps its instruments.
FOLDERS = {"predictors": "instruments/predictors", "segmenter": "instruments/segmenter"}


@dataclass(frozen=True)
class Instruments:
    """What measures released images.

    Attributes
    ----------
    predictors
        Of covariates; None: they are not measured.
    segmenter
        Of label maps; None: there are none.
    covariates
        The study's.
    grid
        Of the images.
    structures
        Of label maps, in the order of their numbers from 1.
    """

    predictors: Predictors | None
    segmenter: Segmenter | None
    covariates: Covariates
    grid: Grid
    structures: Sequence[str] = ()

    @classmethod
    def load(
        cls, places: Mapping[str, Path | None], covariates: Covariates, grid: Grid, structures: Sequence[str] = ()
    ) -> Self:
        """Instruments by the folders that they lie in, named as in `FOLDERS`."""
        predictors, segmenter = places.get("predictors"), None
        if path := places.get("segmenter"):
            from meddiff_steps.instruments.segmenter import load_segmenter  # loads MONAI, which takes seconds

            segmenter = load_segmenter(path)[0]
        return cls(
            load_predictors(predictors) if predictors else None,
            segmenter,
            covariates,
            grid,
            structures,
        )

    def measure(
        self, stored: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[dict[str, float | str], np.ndarray | None]:
        """Columns `COVARIATE_measured` and `COVARIATE_segmented` of an image by its stored values, and its label map:
        `labels` where it was drawn from one, else what the segmenter sees, if there is a segmenter.

        Numbers have six digits; of a label the most probable level is told.  Volumes (mL) are those of the label map.
        """
        image = scaled(stored)
        found: dict[str, float | str] = {}
        for name, value in (self.predictors.measure(image) if self.predictors else {}).items():
            covariate = self.covariates[name]
            if isinstance(covariate, CategoricalCovariate):
                found[name + MEASURED] = covariate.levels[int(np.argmax(value[0]))]
            else:
                found[name + MEASURED] = _rounded(float(value[0]))
        if labels is not None:
            return found | volumes(labels, self.structures, self.grid, self.covariates), labels
        if self.segmenter is None:
            return found, None
        labels = self.segmenter.label_map(torch.from_numpy(image))
        return found | volumes(labels, self.segmenter.structures, self.grid, self.covariates), labels

    def chances(self, stored: np.ndarray) -> dict[str, np.ndarray]:
        """Probability of each level, by the column of each label that is measured."""
        found = self.predictors.measure(scaled(stored)) if self.predictors else {}
        return {name + MEASURED: value[0] for name, value in found.items() if value.ndim == 2}


def scaled(stored: np.ndarray) -> np.ndarray:
    """Stored values of an image as instruments take it, float32 (1, 1, *spatial) in [0, 1]."""
    scale = VOLUME_SCALE if stored.ndim == 3 else PICTURE_SCALE
    return (stored.astype(np.float32) / np.float32(scale))[None, None]


def volumes(
    labels: np.ndarray, structures: Sequence[str], grid: Grid, covariates: Covariates
) -> dict[str, float | str]:
    """Volume in mL of each structure in a label map, by its column; of those that are a covariate."""
    assert grid.affine is not None
    voxel_ml = abs(math.prod(np.diag(grid.affine)[:3])) / 1000
    counts = np.bincount(labels.ravel(), minlength=len(structures) + 1)
    return {
        name + SEGMENTED: _rounded(counts[place] * voxel_ml)
        for place, name in enumerate(structures, start=1)
        if name in covariates
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def instruments_of(release: Sealed, folder: Path) -> tuple[Instruments, list[str]]:
    """Instruments of a study's folder by which a release was measured, and which of those it was measured by are not
    there, or are others.
    """
    study = release.study
    assert study is not None
    found, missing = {}, []
    for kind, place in FOLDERS.items():
        wanted = release.instrument(kind)
        if wanted is None:
            continue
        if not (folder / place / CARD).is_file():
            missing.append(f"{folder / place}: not there")
        elif read_json(folder / place / CARD).get("weights_sha256") != wanted:
            missing.append(f"{folder / place}: other weights than the images were measured by")
        else:
            found[kind] = folder / place
    grid = Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    try:
        return Instruments.load(found, study.covariates, grid, study.structures), missing
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: instruments that cannot be read ({type(error).__name__}: {error})") from None
