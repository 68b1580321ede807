"""What an attacker gains, in figures with intervals; each beside what it would be if nothing leaked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import betabinom, hypergeom

from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, Statistic, figure, rounded, wilson
from meddiff_steps.statistics.measures import auc, smaller_side

#: False-positive rates at which a membership attack is judged (Carlini et al. 2022: the average hides the few it
#: exposes).
FALSE_POSITIVE_RATES = (0.01, 0.05, 0.10)


def share(flags: np.ndarray) -> Figure:
    """Share of true values with its Wilson interval."""
    n = len(flags)
    value = float(np.mean(flags)) if n else math.nan
    low, high = wilson(value, n)
    return {"value": rounded(value), "low": rounded(low), "high": rounded(high), "n": n}


def excess_risk(attack: np.ndarray, control: np.ndarray) -> Figure:
    """Success beyond that of the same attack where nothing can have leaked: (p_attack - p_control) / (1 - p_control),
    at least 0.

    Giomi et al. 2023 (Anonymeter), equation 2; the interval combines the two Wilson intervals (Newcombe 1998, method
    10).

    Parameters
    ----------
    attack, control
        Whether each attempt succeeded, bool.  Of none on either side nothing is known: None.
    """
    if not len(attack) or not len(control):
        return {"value": None, "low": None, "high": None, "n": len(attack)}
    a, b = float(np.mean(attack)), float(np.mean(control))
    (a_low, a_high), (b_low, b_high) = (wilson(share, len(x)) for share, x in ((a, attack), (b, control)))
    scale = max(1.0 - b, 1e-9)
    low = a - b - np.hypot(a - a_low, b_high - b)
    high = a - b + np.hypot(a_high - a, b - b_low)
    ends = [min(1.0, max(0.0, float(x) / scale)) for x in (a - b, low, high)]
    if ends[2] == 0:  # surely none; what so few attempts leave open is said all the same
        ends[2] = a_high - a
    return {"value": rounded(ends[0]), "low": rounded(ends[1]), "high": rounded(ends[2]), "n": len(attack)}


def nearer_to_training(
    training: np.ndarray, held_out: np.ndarray, resamples: int, generator: np.random.Generator
) -> Figure:
    """Share of synthetic images nearer to training people than to as many unseen people; 0.5 if nothing leaked.

    Platzer and Reutterer 2021, with people in place of records, since scans of a person are alike.  Of the larger side
    as many count as the other has; the figure is the mean over all such choices.  Ties count half.

    The interval is as wide as the figure varies when people change sides at random: where nothing leaked it makes no
    difference which side they are on, and 95 % of such intervals hold 0.5.

    Parameters
    ----------
    training, held_out
        Similarity of each synthetic image to the nearest scan of each training person (m, p) and of each unseen person
        (m, h).
    """
    larger, smaller = sorted((training, held_out), key=lambda side: side.shape[1], reverse=True)
    (images, people), count = larger.shape, smaller.shape[1]
    # Chance that `count` of the larger side hold none of the 0, 1, ... who are nearer than the nearest of the smaller.
    none = hypergeom.pmf(0, people, np.arange(people + 1), count)
    best = smaller.max(1, keepdims=True)
    value = float(np.mean(none[(larger > best).sum(1)] + none[(larger >= best).sum(1)])) / 2
    everybody = np.tile(np.arange(people + count, dtype=np.int32), (resamples, 1))
    changed = np.ascontiguousarray(generator.permuted(everybody, axis=1)[:, :count])
    draws = np.zeros(resamples)
    for one, other in zip(larger, smaller, strict=True):
        nearer = np.argsort(np.argsort(-np.concatenate([one, other])))
        draws += none[nearer[changed].min(1)] / images
    if smaller is held_out:
        value, draws = 1.0 - value, 1.0 - draws
    return figure(value, (value + 0.5 - draws).clip(0.0, 1.0), count, share_of=min(count, images))


def authenticity(to_training: np.ndarray, nearest: np.ndarray, among_training: np.ndarray) -> Figure:
    """Share of images that are not nearer to a training scan than any other training scan is to that one.

    Alaa et al. 2022, "How faithful is your synthetic data?", section 3.  Density biases it: compare with the same
    figure of held-out real scans.

    Parameters
    ----------
    to_training, nearest
        Similarity of each image to its nearest training scan, and which one that is, (n,).
    among_training
        Similarity of each training scan to its nearest other, (m,).
    """
    return share(to_training <= among_training[nearest])


def true_positive_rate(members: np.ndarray, scores: np.ndarray, false_positive_rate: float) -> Statistic:
    """Share of members above the threshold that this share of non-members exceeds; columns (rows,)."""
    order = np.argsort(-scores, kind="stable")
    member = np.asarray(members, dtype=bool)[order]
    ends = np.flatnonzero(np.concatenate([np.diff(-np.asarray(scores)[order]) > 0, [True]]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        ordered = weights[:, order]
        hits, false = np.cumsum(ordered * member, axis=1)[:, ends], np.cumsum(ordered * ~member, axis=1)[:, ends]
        total_false = false[:, -1:]
        allowed = false <= false_positive_rate * total_false + 1e-9
        # Thresholds are sorted, so what is allowed comes first; none allowed means that nobody is called a member.
        count = allowed.sum(1)
        rows = np.arange(len(hits))
        return np.where(count > 0, hits[rows, np.maximum(count - 1, 0)], 0.0) / hits[:, -1]

    return statistic


def membership(
    members: np.ndarray, scores: np.ndarray, subjects: Sequence[str], resamples: int, seed: str, label: str
) -> dict[str, Any]:
    """How well `scores` tell training subjects from others: AUC (0.5 if nothing leaked) and TPR at low FPR (the FPR
    itself).

    Parameters
    ----------
    members, scores, subjects
        Per scan: in the training set or not, the attacker's score, whose it is.
    """
    bootstrap = Bootstrap(list(subjects), resamples, seed, f"membership|{label}")
    result: dict[str, Any] = {"auc": bootstrap.figure(auc(members, scores), smaller_side(members, subjects))}
    found = len(set(np.asarray(subjects, dtype=str)[members]))
    for rate in FALSE_POSITIVE_RATES:
        result[f"tpr_at_{rate:g}"] = bootstrap.figure(true_positive_rate(members, scores, rate), found)
    # The worst-off: members whom an attacker would find without accusing any of the others.
    worst = scores[members] > scores[~members].max(initial=-np.inf)
    return result | {
        "exposed_members": int(worst.sum()),
        "members": int(members.sum()),
        "others": int((~members).sum()),
    }


def density_ratio(
    candidates: np.ndarray, synthetic: np.ndarray, reference: np.ndarray, dimensions: int = 8
) -> np.ndarray:
    """log p_synthetic(x) - log p_reference(x), by Gaussian kernel densities on principal components, (n,).

    DOMIAS (van Breugel et al. 2023): a model that has overfitted puts more density on its training subjects than the
    population does.

    Parameters
    ----------
    candidates, synthetic, reference
        Embeddings (n, d), (s, d), (r, d); the reference is real and neither member nor tested.
    """
    mean = synthetic.mean(0)
    basis = np.linalg.svd(synthetic - mean, full_matrices=False)[2][
        : min(dimensions, len(synthetic) - 1, len(reference) - 1)
    ]
    projected = [(x - mean) @ basis.T for x in (candidates, synthetic, reference)]
    scale = projected[1].std(0) + 1e-12
    x, s, r = (p / scale for p in projected)

    def log_density(points: np.ndarray, data: np.ndarray) -> np.ndarray:
        n, d = data.shape
        width = n ** (-1.0 / (d + 4))  # Scott's rule
        square = ((points**2).sum(1)[:, None] + (data**2).sum(1)[None] - 2 * points @ data.T) / width**2
        lowest = square.min(1, keepdims=True)
        return -0.5 * lowest[:, 0] + np.log(np.exp(-0.5 * (square - lowest)).sum(1)) - np.log(n) - d * np.log(width)

    return log_density(x, s) - log_density(x, r)


def flagged_as_expected(flagged: int, people: int, level: float, calibrated_on: int) -> bool:
    """Whether no more unseen people are flagged than the level allows (one-sided test at 1 %).

    Thresholds are random: the share that one detector flags is distributed as Beta(level (n + 1), (1 - level) (n + 1))
    over calibrations on n subjects (Vovk 2012, where level (n + 1) is whole), so that the number flagged is
    beta-binomial.  For the union of several detectors this is an approximation.
    """
    share_of = level * (calibrated_on + 1), (1.0 - level) * (calibrated_on + 1)
    return people > 0 and bool(betabinom.sf(flagged - 1, people, *share_of) > 0.01)
