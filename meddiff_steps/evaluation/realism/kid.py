"""The metric `kid`: kernel inception distance, the unbiased squared MMD between both sets."""

from __future__ import annotations

import numpy as np

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale, resampled, shared_units
from meddiff_steps.statistics.bootstrap import Figure, centred, rounded
from meddiff_steps.statistics.bootstrap import figure as with_interval

ENTRY = {
    "order": 2,
    "title": "kernel distance (KID)",
    "summary": (
        "Squared distance between both distributions by a cubic kernel, without bias, with the p-value of a"
        " permutation test."
    ),
    "source": "Binkowski et al. 2018; Gretton et al. 2012, equation 3",
    "blind_to": (
        "differences beyond the third moments of the features, which a cubic kernel cannot see; and copies of training"
        " scans. A small p-value says that there is a difference, not that it matters."
    ),
}


def polynomial_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(x.y / d + 1)^3 of all rows (n, d) and (m, d), float64 (n, m); Binkowski et al. 2018, section 4."""
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _mmd(kernel: np.ndarray, first: np.ndarray, second: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD between rows drawn as the weights `first` and `second` say, (b, n) each, of one pooled
    kernel (n, n).

    Rows of one unit are not compared, neither within a sample nor between both: scans of a person, a row that was drawn
    twice, or a scan and its reconstruction, are alike for another reason.
    """
    same = np.equal.outer(units, units)
    compared = np.where(same, 0.0, kernel)
    within = []
    for weights in (first, second):
        pairs = weights.sum(1) ** 2 - ((weights @ same) * weights).sum(1)
        within.append(((weights @ compared) * weights).sum(1) / np.maximum(pairs, 1.0))
    pairs = first.sum(1) * second.sum(1) - ((first @ same) * second).sum(1)
    between = ((first @ compared) * second).sum(1) / np.maximum(pairs, 1.0)
    return within[0] + within[1] - 2.0 * between


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel inception distance (KID): unbiased squared MMD with `polynomial_kernel` of features (n, d) and (m, d).

    Gretton et al. 2012, equation 3.  Its expectation does not depend on the number of images, so samples of one
    distribution give about 0, above or below.  monai.metrics.MMDMetric has a linear kernel, which compares means only.
    """
    pooled = np.concatenate([a, b]).astype(np.float64)
    first = np.arange(len(pooled)) < len(a)
    return float(
        _mmd(polynomial_kernel(pooled, pooled), first[None] * 1.0, ~first[None] * 1.0, np.arange(len(pooled)))[0]
    )


def _permuted(units: np.ndarray, first: np.ndarray, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (permutations, n), true for those that are given to the first sample, which had the rows `first`, (n,).

    As many units as it had, chosen at random: a subject is never divided.  Units in both samples change sides or do
    not, each by chance.
    """
    names, unit_of_row = np.unique(units, return_inverse=True)
    had, other = (np.bincount(unit_of_row[rows], minlength=len(names)) > 0 for rows in (first, ~first))
    lone = ~(had & other)
    given = (
        rng.random((permutations, len(names))) < 0.5 if not lone.all() else np.zeros((permutations, len(names)), bool)
    )
    given[:, lone] = rng.random((permutations, lone.sum())).argsort(axis=1) < (had & lone).sum()
    return np.where(lone[unit_of_row], given[:, unit_of_row], first ^ given[:, unit_of_row])


def figure(synthetic: Sample, reference: Sample, scale: Scale, draws: Draws) -> Figure:
    """KID of two samples on all features, with its interval (`draws.slow_resamples`) and the p-value of a permutation
    test of equal distributions.

    Returns
    -------
    dict
        A figure with `p_value`, (1 + permutations at least as far apart) / (1 + permutations).
    """
    a, b = synthetic, reference
    pooled = np.concatenate([a.features, b.features])
    kernel = polynomial_kernel(pooled, pooled)
    first = np.arange(len(pooled)) < len(a)
    units = np.unique(shared_units(a, b), return_inverse=True)[1]
    value = float(_mmd(kernel, first[None] * 1.0, ~first[None] * 1.0, units)[0])
    weights = [np.zeros((draws.slow_resamples, len(pooled))) for _ in range(2)]
    weights[0][:, first], weights[1][:, ~first] = resampled(a, b, draws, "kid")
    found = _mmd(kernel, weights[0], weights[1], units)
    chosen = _permuted(units, first, draws.permutations, philox(draws.seed, f"kid permutations {draws.label}"))
    shuffled = _mmd(kernel, chosen * 1.0, ~chosen * 1.0, units)
    p_value = (1 + int((shuffled >= value).sum())) / (1 + draws.permutations)
    return with_interval(value, centred(value, found), len(np.unique(a.units))) | {"p_value": rounded(p_value)}
