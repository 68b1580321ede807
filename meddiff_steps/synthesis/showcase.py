"""What the report shows beside the cohort: one subject with one covariate moved, and paths between two subjects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from meddiff_steps.cohort.learnt import LearntNumber, learnt, shown
from meddiff_steps.config import ContinuousCovariate, Covariates
from meddiff_steps.core.random_streams import noise, seed_key
from meddiff_steps.synthesis.generate import CohortGenerator

#: Subjects (rows) per panel.
ROWS = 2


@dataclass(frozen=True)
class Tile:
    """One image of a panel before it is sampled: where it stands, its caption, its request and its noise."""

    panel: str
    row: int
    position: int
    label: str
    request: dict[str, object]
    noise: np.ndarray


def tiles(
    covariates: Covariates, training: pd.DataFrame, seed: str, steps: int, latent_shape: tuple[int, ...]
) -> list[Tile]:
    """Sweeps over every covariate (same noise, other covariates typical) and interpolations of noise.

    Parameters
    ----------
    training
        Manifest rows of the train split.
    steps
        Images per row for a continuous covariate; a categorical one shows each of its levels.
    """
    typical = {name: _typical(training[name], covariate) for name, covariate in covariates.items()}
    starts = [noise(seed_key(f"{seed}/showcase", row, 0, "noise"), latent_shape) for row in range(ROWS + 1)]
    found = []
    for name, covariate in covariates.items():
        known = learnt(training[name], covariate, training["subject_id"])
        values: list[object]
        if isinstance(known, LearntNumber):
            values = known.sweep(steps).tolist()
            labels = [f"{text} {getattr(covariate, 'unit', '')}" for text in shown(known.sweep(steps))]
        else:
            values, labels = list(known.levels), list(known.levels)
        found += [
            Tile(f"sweep:{name}", row, position, labels[position], typical | {name: value}, starts[row])
            for row in range(ROWS)
            for position, value in enumerate(values)
        ]
    for row in range(ROWS):
        for position, share in enumerate(np.linspace(0, 1, steps)):
            found.append(
                Tile(
                    "interpolation",
                    row,
                    position,
                    f"{share:.0%}",
                    typical,
                    slerp(starts[row], starts[row + 1], float(share)),
                )
            )
    return found


def _typical(values: pd.Series, covariate: object) -> object:
    known = values.dropna()
    return float(known.median()) if isinstance(covariate, ContinuousCovariate) else str(known.mode().iloc[0])


def slerp(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """Spherical interpolation, which keeps the norm that Gaussian noise has (Shoemake 1985)."""
    a, b = start.ravel().astype(np.float64), end.ravel().astype(np.float64)
    angle = np.arccos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
    mixed = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    return mixed.reshape(start.shape).astype(np.float32)


def render(found: list[Tile], generator: CohortGenerator, seed: str) -> Iterator[tuple[Tile, np.ndarray]]:
    """(tile, image float32 (1, *spatial) in [0, 1]) for every tile, in order, in padded batches."""
    size = generator.settings.batch_size
    for start in range(0, len(found), size):
        batch = found[start : start + size]
        padded = batch + [batch[-1]] * (size - len(batch))
        requests = pd.DataFrame([tile.request for tile in padded])
        condition = generator.model.condition(requests)
        of_masks = None if generator.masks is None else generator.masks.condition(requests)
        subjects = [(f"{seed}/showcase", tile.row, 0) for tile in padded]
        condition, _ = generator.with_labels(condition, of_masks, subjects)
        latents = generator.latents(np.stack([tile.noise for tile in padded]), condition, subjects)
        images = generator.decode(latents, subjects)
        yield from zip(batch, images, strict=False)
