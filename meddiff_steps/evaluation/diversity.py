"""Diversity: do synthetic images vary as much as real ones, and cover what real ones show?

Every figure stands beside the same figure of as many real training scans in place of the synthetic images.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist, pdist, squareform
from tqdm import tqdm

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.image_quality import SsimSettings, structural_similarity
from meddiff_steps.evaluation.realism.base import Sample
from meddiff_steps.imaging.selection import one_of_each
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, Statistic, figure, rounded
from meddiff_steps.statistics.measures import mean_of

#: Image values compared at once; SSIM holds about ten float32 copies.
PAIR_VALUES = 2**21
#: Images that the Vendi score is of, at most: its interval needs the eigenvalues of as many matrices of this size.
VENDI_IMAGES = 250


# ------------------------------------------------------------------------ precision, recall, density, coverage


def neighbour_radii(features: np.ndarray, neighbours: int, own: np.ndarray | None = None) -> np.ndarray:
    """Distance of each row (n, d) to its k-th nearest other row, (n, 1); k is at most n - 1.

    Parameters
    ----------
    own
        Rows that belong to who is judged, bool (n, m): for each of m, the distance is to the k-th nearest of the rows
        that are not its own, (n, m).
    """
    distances = cdist(features, features)
    if own is None:
        last = min(neighbours, len(features) - 1)
        return np.partition(distances, last, axis=1)[:, last, None]
    np.fill_diagonal(distances, -1.0)  # before its duplicates
    nearest = np.argsort(distances, axis=1, kind="stable")[:, 1 : neighbours + int(own.sum(0).max()) + 1]
    place = ((~own[nearest]).cumsum(1) < neighbours).sum(1)
    place = np.minimum(place, nearest.shape[1] - 1)
    return np.take_along_axis(np.take_along_axis(distances, nearest, 1), place, 1)


def manifold_shares(
    real: np.ndarray, synthetic: np.ndarray, neighbours: int, same: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What precision, recall, density and coverage are the means of.

    Balls around the real images that reach their k-th nearest neighbour are where real images are; likewise for
    synthetic ones. Kynkäänniemi et al. 2019 (precision, recall; equation 2) and Naeem et al. 2020 (density, coverage;
    equations 3 and 4), which the package `prdc` computes; these lines keep the single images, which intervals need.

    Parameters
    ----------
    real, synthetic
        Features (r, d) and (s, d).
    neighbours
        k.
    same
        Pairs of one subject, bool (r, s), such as a scan and its reconstruction: an image is judged as if there were
        none of its own subject on the other side.

    Returns
    -------
    dict
        `precision` and `density` per synthetic image, `recall` and `coverage` per real one.
    """
    distances = cdist(real, synthetic) if same is None else np.where(same, np.inf, cdist(real, synthetic))
    inside = distances < neighbour_radii(real, neighbours, same)
    return {
        "precision": inside.any(0) * 1.0,
        "recall": (distances < neighbour_radii(synthetic, neighbours, None if same is None else same.T).T).any(1) * 1.0,
        "density": inside.sum(0) / min(neighbours, len(real) - 1),
        "coverage": inside.any(1) * 1.0,
    }


def expected_coverage(real: int, synthetic: int, neighbours: int) -> float:
    """Coverage of two samples of one distribution: 1 - (r - 1)...(r - k) / ((s + r - 1)...(s + r - k)) (Naeem et al.
    2020, lemma 2).
    """
    steps = np.arange(1, neighbours + 1)
    return float(1.0 - np.prod((real - steps) / (synthetic + real - steps)))


# --------------------------------------------------------------------------------------------------- Vendi


def vendi_score(kernel: np.ndarray) -> float:
    """Effective number of distinct images: exp of the entropy of the eigenvalues of K / n (Friedman and Dieng 2023,
    definition 3.1).

    Parameters
    ----------
    kernel
        Similarities K (n, n), symmetric, positive semi-definite, with 1 on the diagonal.

    Returns
    -------
    float
        1 if all are the same, n if none resembles another.
    """
    return _vendi(kernel, np.ones(len(kernel)))


def _vendi(kernel: np.ndarray, weights: np.ndarray) -> float:
    """Of rows drawn as often as `weights` (n,) says."""
    root = np.sqrt(weights[weights > 0] / weights.sum())
    values = np.maximum(np.linalg.eigvalsh(kernel[np.ix_(weights > 0, weights > 0)] * root * root[:, None]), 0.0)
    return float(np.exp(-np.sum(values * np.log(np.where(values > 0, values, 1.0)))))


def kernel_width(features: np.ndarray) -> float:
    """Median squared distance between rows (n, d): the unit in which `vendi_figure` measures distance."""
    return float(np.median(pdist(features, "sqeuclidean"))) or 1.0


def vendi_figure(sample: Sample, width: float) -> Figure:
    """`vendi_score` with its interval, of at most `VENDI_IMAGES` images.

    The kernel is exp(-|x - y|^2 / width).  Cosines, which the paper takes of embeddings, would call images alike that
    differ from real ones in one direction, and different where they differ by next to nothing; distances in a unit of
    real images do neither.

    The interval is from the jackknife over units: on 200 samples of 40 points it held the expected score 94.5 % of the
    time, the bootstrap, whose repeated rows have no diversity, 86 %.
    """
    chosen = np.unique(np.linspace(0, len(sample) - 1, min(len(sample), VENDI_IMAGES)).round().astype(int))
    kernel = np.exp(-squareform(pdist(sample.features[chosen], "sqeuclidean")) / width)
    units = sample.units[chosen]
    names = np.unique(units)
    value = vendi_score(kernel)
    without = (
        np.array([_vendi(kernel, (units != name) * 1.0) for name in names]) if len(names) > 1 else np.full(1, np.nan)
    )
    error = 1.96 * math.sqrt((len(names) - 1) / len(names) * float(np.sum(np.square(without - without.mean()))))
    if error < 1e-9 * value:  # no image changes anything, as where all are alike
        error = math.nan
    return {
        "value": rounded(value),
        "low": rounded(max(value - error, 1.0)),
        "high": rounded(value + error),
        "n": len(names),
    }


def variety(
    sample: Sample, reference: Sample, width: float, *, neighbours: int, resamples: int, seed: str, label: str
) -> dict[str, Figure]:
    """`precision`, `recall`, `density` and `coverage` of a sample against the reference, and its `vendi`.

    The first four are against one row of each unit of the reference: balls that reach the next scan of the same subject
    would be those of a person, not of what people have in common.  Where subjects are in both samples, a row is judged
    as if the other had none of its subject.

    Parameters
    ----------
    sample, reference
        In standard deviations.
    width
        `kernel_width` of real images.
    neighbours
        Of the first four.
    resamples, seed, label
        Of their bootstrap.
    """
    rows = one_of_each(reference.units)
    reference = Sample(reference.features[rows], reference.units[rows])
    same = np.equal.outer(reference.units.astype(str), sample.units.astype(str))
    shares = manifold_shares(reference.features, sample.features, neighbours, same if same.any() else None)
    found: dict[str, Figure] = {}
    for name, values in shares.items():
        units = sample.units if name in ("precision", "density") else reference.units
        boot = Bootstrap(units, resamples, seed, f"manifold {label} {name}")
        # Density is no share, but where it is 0 for all, the share of images near any real one is.
        share_of = 0 if name == "density" and np.any(values) else boot.n
        found[name] = boot.figure(mean_of(values), share_of)
    return found | {"vendi": vendi_figure(sample, width)}


def diversity(samples: Mapping[str, Sample], *, neighbours: int, resamples: int, seed: str) -> dict[str, Any]:
    """Diversity in one feature space.

    Parameters
    ----------
    samples
        `synthetic`, `training` (as many) and `held_out`, in standard deviations; `reconstructions` of held-out
        scans, and these `originals`, where there are enough.
    neighbours
        Of precision, recall, density and coverage.
    resamples, seed
        Of the bootstrap of the first four.

    Returns
    -------
    dict
        `precision`, `recall`, `density`, `coverage` (against held-out scans) and `vendi`, each a figure with a
        `ceiling`, and `reconstructions`, a figure whose `ceiling` is that of the same scans before they were encoded.
        Intervals of the first four are over the images that are judged, with the balls as they are.
    """
    width = kernel_width(samples["training"].features)

    def beside(kind: str, real: str) -> dict[str, Figure]:
        found, ceiling = (
            variety(
                samples[label],
                samples["held_out"],
                width,
                neighbours=neighbours,
                resamples=resamples,
                seed=seed,
                label=label,
            )
            for label in (kind, real)
        )
        return {name: figure | {"ceiling": ceiling[name]} for name, figure in found.items()}

    out = beside("synthetic", "training")
    if "reconstructions" in samples:
        for name, figure in beside("reconstructions", "originals").items():
            out[name]["reconstructions"] = figure
    return out


# ----------------------------------------------------------------------------------- similarity of pairs


def draw_pairs(units: Sequence[str] | np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct unordered pairs of images of different units, int (pairs, 2); fewer than `count` where there are no
    more.

    Public evaluation scripts compare all n (n - 1) ordered pairs, twice the work for the same mean, and read both
    images again for each; a sample of pairs with an interval says as much.
    """
    codes = np.unique(np.asarray(units, dtype=str), return_inverse=True)[1]
    n = len(codes)
    if n * (n - 1) // 2 <= 4 * count:
        pairs = np.stack(np.triu_indices(n, 1), axis=1)
        pairs = pairs[codes[pairs[:, 0]] != codes[pairs[:, 1]]]
        return pairs[rng.permutation(len(pairs))[:count]]
    found: dict[tuple[int, int], None] = {}
    for _ in range(100):
        for a, b in rng.integers(0, n, size=(count, 2)):
            if codes[a] != codes[b] and len(found) < count:
                found[(min(a, b), max(a, b))] = None
    return np.array(list(found), dtype=int).reshape(-1, 2)


def pair_statistic(pairs: np.ndarray, values: np.ndarray) -> Statistic:
    """Mean of the values (pairs,) of pairs of rows; a pair counts as often as both of its images were drawn,
    multiplied.
    """

    def statistic(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, pairs[:, 0]] * weights[:, pairs[:, 1]]
        return drawn @ values / drawn.sum(1)

    return statistic


def pair_similarity(
    read: Callable[[np.ndarray], np.ndarray],
    units: Sequence[str] | np.ndarray,
    shape: Sequence[int],
    *,
    pairs: int,
    resamples: int,
    seed: str,
    label: str,
) -> Figure:
    """Mean (MS-)SSIM of randomly drawn pairs of images: high where images resemble each other.

    Parameters
    ----------
    read
        Rows (k,) to images (k, 1, *shape) in [0, 1].
    units
        Subject of each image; two of one subject are never compared.
    shape
        Spatial; it decides the settings (`SsimSettings.for_shape`).  Values of different settings cannot be compared.
    pairs, resamples, seed, label
        How many pairs at most; the interval is over images, since pairs share them.

    Returns
    -------
    dict
        A figure with `pairs`, their number.
    """
    chosen = draw_pairs(units, pairs, philox(seed, f"pairs {label}"))
    settings = SsimSettings.for_shape(shape)
    step = max(1, PAIR_VALUES // int(np.prod(shape)))
    boot = Bootstrap(units, resamples, seed, f"pairs {label}")
    if len(chosen) == 0:
        return figure(np.nan, np.full(resamples, np.nan), boot.n) | {"pairs": 0}
    values = []
    with tqdm(
        total=len(chosen), desc=f"similarity of {label} pairs", unit="pair", mininterval=5, file=sys.stderr
    ) as progress:
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            values.append(structural_similarity(read(part[:, 0]), read(part[:, 1]), settings))
            progress.update(len(part))
    return boot.figure(pair_statistic(chosen, np.concatenate(values))) | {"pairs": len(chosen)}
