"""Images of some sites as another site shows them, beside what a curve of grey values can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.domains import Domain
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.unpaired import Side

ENTRY = {
    "order": 11,
    "summary": "Scans of other sites or scanners, as one site shows them, and whether the site can still be told",
    "source": "Özbey et al. 2023 (SynDiff); Fortin et al. 2018 (ComBat)",
    "needs": ["a categorical covariate that says the site", "training scans of both sides"],
}

#: Quantiles of a head's grey values that are brought onto those of the reference.
QUANTILES = np.linspace(0.0, 1.0, 101)
#: Training people of a side of whom all scans are taken, where so many fit.
LEAST_PEOPLE = 16


def sides(settings: config.Harmonisation, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which scans of a manifest are taken to another look, and which have that look, bool (n,) each.

    Raises
    ------
    UserError
        A side is empty.
    """
    site = table[settings.covariate].astype(object)
    there = (site == settings.to).to_numpy(dtype=bool)
    here = site.isin(settings.others).to_numpy() if settings.others else (site.notna().to_numpy() & ~there)
    for key, found, wanted in (
        ("to", there, settings.to),
        ("others", here, ", ".join(settings.others) or "all others"),
    ):
        if not found.any():
            raise UserError(
                f"harmonisation.{key}: no preprocessed scan has {settings.covariate} {wanted}; there are"
                f" {', '.join(sorted(map(str, site.dropna().unique())))}."
            )
    return here, there


def training_scans(cohort: Images, most: int) -> pd.DataFrame:
    """Training scans that ways are judged by, at most so many of each side, all of each of some people.

    Parameters
    ----------
    cohort
        Scans of both sides; column `there` of the table says whose look is taken.
    """
    table = cohort.table
    there, train = table["there"].to_numpy(dtype=bool), (table["split"] == "train").to_numpy()
    chosen: list[str] = []
    for side in (there, ~there):
        chosen += cohort.taken(np.flatnonzero(side & train).tolist()).whole_units(most, LEAST_PEOPLE).ids
    return table[table[cohort.key].isin(chosen)].reset_index(drop=True)


def domains(settings: config.Harmonisation, shards: Shards, table: pd.DataFrame) -> dict[Side, Domain]:
    """The two groups: scans of other sites, and of the one whose look is taken.

    A subject who was scanned on both sides is in the larger of them alone, so that nobody is seen on both.

    Parameters
    ----------
    table
        A row per scan of the shards, in their order: `subject_id`, `split` and the covariate.
    """
    here, there = sides(settings, table)
    subjects = table["subject_id"].to_numpy(dtype=str)
    both = np.isin(subjects, np.intersect1d(subjects[here], subjects[there]))
    if here.sum() >= there.sum():
        there = there & ~both
    else:
        here = here & ~both
    columns = (settings.channel,)
    found: dict[Side, Domain] = {}
    for side, inside in (("a", here), ("b", there)):
        rows = {split: np.flatnonzero(inside & (table["split"] == split).to_numpy()) for split in ("train", "val")}
        name = settings.to if side == "b" else ", ".join(settings.others) or f"not {settings.to}"
        found["b" if side == "b" else "a"] = Domain(
            f"harmonisation: {settings.covariate} {name}", shards, columns, rows["train"], rows["val"]
        )
    return found


@dataclass(frozen=True)
class GreyValues:
    """What grey values within the head are at the site whose look is taken.

    Attributes
    ----------
    quantiles
        Mean over its scans of each scan's, (QUANTILES,).
    mean, spread
        Mean over its scans of each scan's mean and standard deviation.
    """

    quantiles: np.ndarray
    mean: float
    spread: float

    @classmethod
    def of(cls, images: Sequence[np.ndarray] | np.ndarray) -> Self:
        """Of images (n, 1, *spatial) in [0, 1]; 0 is outside of the head."""
        heads = [image[image > 0] for image in images if (image > 0).any()]
        if not heads:
            raise UserError("harmonisation: images of the site whose look is taken are empty. Look at the scans.")
        quantiles = np.mean([np.quantile(values, QUANTILES) for values in heads], 0)
        return cls(quantiles, float(np.mean([h.mean() for h in heads])), float(np.mean([h.std() for h in heads])))

    def matched(self, image: np.ndarray) -> np.ndarray:
        """An image (1, *spatial) with this histogram within its head: quantile by quantile (as Nyúl and Udupa 1999)."""
        inside = image > 0
        if not inside.any():
            return image.copy()
        own = np.quantile(image[inside], QUANTILES)
        return self._within(image, np.interp(image[inside], own, self.quantiles))

    def scaled(self, image: np.ndarray) -> np.ndarray:
        """An image (1, *spatial) with this mean and spread within its head (z-score)."""
        inside = image > 0
        if not inside.any():
            return image.copy()
        values = image[inside]
        return self._within(image, (values - values.mean()) / max(float(values.std()), 1e-6) * self.spread + self.mean)

    @staticmethod
    def _within(image: np.ndarray, values: np.ndarray) -> np.ndarray:
        made = np.zeros_like(image, dtype=np.float32)
        made[image > 0] = np.clip(values, 0.0, 1.0)
        return made
