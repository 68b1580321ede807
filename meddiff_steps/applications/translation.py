"""Another contrast of a scan, drawn by a diffusion from the contrasts that there are (Palette, Saharia et al. 2022).

It draws what is left of the mean that a network without noise says (CorrDiff, Mardani et al. 2023).  Beside it stand
that mean, and what needs no network: copies and a linear regression on patches.  Where no
subject has both contrasts, networks that saw no pairs draw it (SynDiff, Özbey et al. 2023).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.applications.unpaired import Translator
from meddiff_steps.imaging.pairs import Pairs

log = logging.getLogger(__name__)

ENTRY = {
    "order": 10,
    "summary": "A missing contrast of a scan, drawn from those that there are, with a map of how unsure it is",
    "source": "Saharia et al. 2022 (Palette)",
    "needs": ["training scans with both contrasts"],
}

#: Ways of networks that saw no pairs.
UNPAIRED = ("unpaired_guess", "unpaired_mean", "unpaired_draws")
#: Side of the patches of the linear regression, voxels of a training scan that it is fitted to, and the ridge, in mean
#: squares of a column.
PATCH, PATCH_VOXELS, RIDGE = 5, 2000, 1e-3


@dataclass(frozen=True)
class PatchRegression:
    """Each voxel of the target as a linear function of the patches of sources about it, within the head.

    Attributes
    ----------
    weights
        (patch voxels of these sources + 1, targets).
    present
        Which sources are looked at, bool (s,).
    """

    weights: np.ndarray
    present: np.ndarray

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        rows: Sequence[int] | np.ndarray,
        generator: np.random.Generator,
        present: np.ndarray | None = None,
    ) -> Self | None:
        """Fitted by least squares to voxels of training scans that have these sources and what is drawn from them,
        `PATCH_VOXELS` of each; None where no scan has.
        """
        present = np.ones(len(pairs.source), bool) if present is None else present
        asked = pairs.asked(present)
        products = moments = 0.0
        for row in rows:
            given, known = (one[0] for one in pairs.there([row]))
            if not (given[present].all() and known[asked].all()):
                continue
            sources, truth = pairs.sources([row])[0][present], pairs.truths([row])[0]
            inside = np.flatnonzero(head(sources))
            if not len(inside):
                continue
            chosen = generator.choice(inside, min(PATCH_VOXELS, len(inside)), replace=False)
            x = patches(sources).reshape(-1, sources[0].size)[:, chosen].T
            x = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
            y = truth.reshape(len(truth), -1)[:, chosen].T.astype(np.float64)
            products, moments = products + x.T @ x, moments + x.T @ y
        if np.ndim(products) == 0:
            names = [name for name, one in zip(pairs.source, present, strict=True) if one]
            log.warning("no training scan has %s and all that is drawn from it: no patches", " and ".join(names))
            return None
        size = np.asarray(products)
        return cls(np.linalg.solve(size + RIDGE * np.diag(size).mean() * np.eye(len(size)), moments), present)

    def __call__(self, sources: np.ndarray) -> np.ndarray:
        """Of all sources (s, *spatial), float32 (targets, *spatial) in [0, 1]; 0 outside of the head."""
        sources = sources[self.present]
        x = patches(sources)
        made = np.tensordot(self.weights[:-1].T, x, 1) + self.weights[-1].reshape(-1, *[1] * (sources.ndim - 1))
        return (made.clip(0.0, 1.0) * head(sources)).astype(np.float32)


def patches(sources: np.ndarray) -> np.ndarray:
    """Sources (s, *spatial) moved to every place of a patch, (s * PATCH**d, *spatial); zeros beyond the edges."""
    reach, spatial = PATCH // 2, sources.shape[1:]
    padded = np.pad(sources, [(0, 0)] + [(reach, reach)] * len(spatial))
    moved = [
        padded[(slice(None), *(slice(a, a + n) for a, n in zip(place, spatial, strict=True)))]
        for place in np.ndindex(*[PATCH] * len(spatial))
    ]
    return np.concatenate(moved)


def head(sources: np.ndarray) -> np.ndarray:
    """Where any source (s, *spatial) shows anything, bool (*spatial)."""
    return np.asarray((sources > 0).any(0))


def translated(drawer: Drawer, row: int, scan_id: str, present: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What the networks make of a scan, by way, float32 (draws, targets, *spatial) in [0, 1]; `present` as of
    `Drawer.draws`.

    `regression` minimises the squared error; `draws` are single draws, each an image as the target is;
    `mean_of_draws` is their mean.
    """
    return {
        "regression": drawer.pairs.decoded(drawer.guess(row, present)[None]),
        **several("", drawer, row, scan_id, present),
    }


def several(
    kind: str, drawer: Drawer, row: int, scan_id: str, present: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The draws among `translated`, their names after that of a kind."""
    drawn = drawer.pairs.decoded(drawer.draws(row, scan_id, present=present))
    return {f"{kind}draws": drawn, f"{kind}mean_of_draws": drawn.mean(0, keepdims=True)}


def without_pairs(translator: Translator, sources: np.ndarray, scan_id: str, samples: int) -> dict[str, np.ndarray]:
    """What networks that never saw two contrasts of one subject make of a scan's sources (s, *spatial), by way
    (`UNPAIRED`), as of `translated`.
    """
    drawn = translator.draws(sources[None], [scan_id], samples)[0]
    return dict(zip(UNPAIRED, (translator.guess(sources[None]), drawn.mean(0, keepdims=True), drawn), strict=True))


def without_a_network(
    pairs: Pairs, present: np.ndarray, regression: PatchRegression | None, row: int
) -> dict[str, np.ndarray]:
    """What needs no network, by way, as of `translated`: each source that is present (s,) as it is, and the regression
    on patches, if there is one.
    """
    sources = pairs.sources([row])[0]
    copies = {
        f"copy_of_{name}": np.repeat(sources[i][None, None], pairs.channels, axis=1)
        for i, name in enumerate(pairs.source)
        if present[i]
    }
    return copies if regression is None else {**copies, "patches": regression(sources)[None]}
