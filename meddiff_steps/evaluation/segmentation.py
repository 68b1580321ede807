"""How well marks of a structure are found, whether their maps are right as probabilities, and whether several draws
differ as several readers do.

Masks are label maps of whole numbers, 0 for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_average_surface_distance
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from meddiff_steps.statistics.bootstrap import Bootstrap, rounded
from meddiff_steps.statistics.measures import mean_of

#: Bins of a map's values, of equal width, for its reliability.
BINS = 10


def overlap(truth: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Of one mask: Dice (mean over labels that `truth` has; NaN where it has none), mean distance of the surfaces of
    what is marked, both ways, in units of `spacing` (the grid's diagonal, more than any other, where nothing is marked
    of a truth that has something; NaN where `truth` has nothing), and voxels marked in both, in the mask, and in
    truth, over all labels.  Of all that is marked, and NaN where `truth` has nothing: `iou`,
    `volume_error` and `area_error`, absolute differences of volume and surface as shares of the true ones.

    Parameters
    ----------
    truth, mask
        (*spatial).
    """
    there, found_there = truth > 0, mask > 0
    size, area = int(there.sum()), surface_area(there, spacing)
    labels = [label for label in np.unique(truth) if label]
    shares = [2 * ((truth == k) & (mask == k)).sum() / ((truth == k).sum() + (mask == k).sum()) for k in labels]
    distance = float(np.linalg.norm(np.array(spacing) * truth.shape)) if size else np.nan
    if size and found_there.any():
        found, true = (torch.from_numpy(one)[None, None] for one in (found_there, there))
        found = compute_average_surface_distance(
            found, true, include_background=True, symmetric=True, spacing=list(spacing)
        )
        distance = float(found[0, 0])
    return {
        "dice_scan": float(np.mean(shares)) if shares else np.nan,
        "surface": distance,
        "iou": float((there & found_there).sum() / (there | found_there).sum()) if size else np.nan,
        "volume_error": abs(int(found_there.sum()) - size) / size if size else np.nan,
        "area_error": abs(surface_area(found_there, spacing) - area) / area if size else np.nan,
        "voxels_both": float(((truth == mask) & there).sum()),
        "voxels_marked": float(found_there.sum()),
        "voxels_true": float(size),
    }


def surface_area(mask: np.ndarray, spacing: Sequence[float]) -> float:
    """Surface of a mask (*spatial), length of its edge in 2D, in units of `spacing`: the integral of the steepness of
    the smoothed mask (the coarea formula; standard deviation 1 voxel), which of a smooth surface does not depend on how
    it lies to the voxels.
    """
    smooth = ndimage.gaussian_filter(np.pad(mask.astype(np.float32), 5), 1.0)
    steepness = np.sqrt(sum(np.square(slope) for slope in np.gradient(smooth, *spacing)))
    return float(steepness.sum() * np.prod(spacing))


def as_probability(truth: np.ndarray, shares: np.ndarray, region: np.ndarray) -> dict[str, Any]:
    """Of a map of probabilities that anything is marked: Brier score, bins of its reliability, and `error_auc`, the
    probability that a voxel where the best guess is wrong has a larger variance p (1 - p) than one where it is right
    (NaN where all are right, or wrong).

    Parameters
    ----------
    truth
        (readers, *spatial): the probability is compared with each.
    shares
        (*spatial), in [0, 1].
    region
        bool (*spatial), voxels that count.
    """
    p = np.broadcast_to(shares[region], (len(truth), int(region.sum()))).ravel().astype(float)
    marked = (truth[:, region] > 0).ravel()
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = {
        "bin_voxels": np.bincount(place, minlength=BINS).astype(float).tolist(),
        "bin_foretold": np.bincount(place, p, BINS).tolist(),
        "bin_marked": np.bincount(place, marked, BINS).tolist(),
    }
    wrong = marked != (p > 0.5)
    return {"brier": float(np.square(p - marked).mean()), "error_auc": _auc(wrong, p * (1 - p)), **bins}


def _auc(positive: np.ndarray, score: np.ndarray) -> float:
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 - IoU of every pair of masks (n, *spatial) and (m, *spatial), (n, m); 0 where both are empty."""
    a, b = (masks.reshape(len(masks), -1) > 0 for masks in (one, other))
    both = (a[:, None] & b[None]).sum(2)
    either = (a[:, None] | b[None]).sum(2)
    return 1.0 - np.where(either > 0, both / np.maximum(either, 1), 1.0)


def like_readers(truth: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Whether draws (k, *spatial) are to each other, and to truth (readers, *spatial), as readers are.

    `ged2` is the squared generalised energy distance, 2 E d(S, Y) - E d(S, S') - E d(Y, Y') with d = 1 - IoU, over all
    pairs, each with itself, too (Kohl et al. 2018, equation 4); `diversity` E d(S, S') and `readers_diversity`
    E d(Y, Y'); `hm_iou` the mean IoU of draws and readers that are matched one to one, each taken as often as needed
    (Kohl et al. 2019); `sensitivity`, the share of what any reader marked that any draw marks, and `dice_max`, of each
    reader the Dice of the draw that is nearest, on average: two of the three parts of the collective insight of Rahman
    et al. 2023.
    """
    between, within, readers = distances(draws, truth), distances(draws, draws), distances(truth, truth)
    turns = int(np.lcm(len(draws), len(truth)))
    matched = np.tile(between, (turns // len(draws), turns // len(truth)))
    pairs = linear_sum_assignment(matched)
    union, marked = (truth > 0).any(0), (draws > 0).any(0)
    iou = 1.0 - between
    return {
        "ged2": float(2 * between.mean() - within.mean() - readers.mean()),
        "diversity": float(within.mean()),
        "readers_diversity": float(readers.mean()),
        "hm_iou": float(1.0 - matched[pairs].mean()),
        "sensitivity": float((union & marked).sum() / union.sum()) if union.any() else np.nan,
        "dice_max": float((2 * iou / (1 + iou)).max(0).mean()),
    }


def calibration_error(voxels: np.ndarray, foretold: np.ndarray, marked: np.ndarray) -> Callable[..., np.ndarray]:
    """Expected calibration error of maps (Guo et al. 2017, equation 3) as a statistic of weights of scans.

    Parameters
    ----------
    voxels, foretold, marked
        (scans, BINS): of each bin how many voxels, the sum of what is foretold, and of what is so.
    """

    def statistic(weights: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.abs(weights @ (foretold - marked)).sum(1) / (weights @ voxels).sum(1)
        return found

    return statistic


def subject_dice(voxels: np.ndarray, units: np.ndarray) -> Callable[..., np.ndarray]:
    """Dice of all scans of a subject together, the mean over subjects with anything to find, as a statistic of weights
    of scans, all of a subject's alike.

    Parameters
    ----------
    voxels
        (scans, 3): marked in both, in the mask, and in truth.
    units
        Subject of each scan.
    """
    names, of_row = np.unique(units, return_inverse=True)
    sums = [np.bincount(of_row, each, len(names)) for each in voxels.T]
    first = np.unique(of_row, return_index=True)[1]
    there = sums[2] > 0
    dice = np.where(there, 2 * sums[0] / np.maximum(sums[1] + sums[2], 1), 0.0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        of_subject = weights[:, first] * there
        found: np.ndarray = (of_subject @ dice) / of_subject.sum(1)
        return found

    return statistic


def figures(rows: pd.DataFrame, *, resamples: int, seed: str) -> list[dict[str, Any]]:
    """A dictionary per method: its name and figures over subjects.

    `dice`, of all scans of a subject together; `dice_scan` and `surface`, means over scans that have something marked;
    `false_alarms`, the share of scans with nothing to find in which something is marked; `ece`; and means of all else
    that was measured, over scans where it is defined.
    """
    listed = ("bin_voxels", "bin_foretold", "bin_marked")
    sums = ("voxels_both", "voxels_marked", "voxels_true")
    found = []
    for method, part in rows.groupby("method", sort=False):
        units = part["subject_id"].to_numpy(dtype=str)
        draws = Bootstrap(units, resamples, seed, "segmentation")
        entry: dict[str, Any] = {"method": method}
        if part["voxels_true"].sum() > 0:
            entry["dice"] = draws.figure(subject_dice(part[list(sums)].to_numpy(), units))
        empty = part[part["voxels_true"] == 0]
        if len(empty):
            alarms = Bootstrap(empty["subject_id"].tolist(), resamples, seed, "segmentation")
            entry["false_alarms"] = alarms.figure(
                mean_of((empty["voxels_marked"] > 0).to_numpy(dtype=float)), share_of=alarms.n
            )
        if part["bin_voxels"].notna().all():
            bins = [np.stack(part[name].tolist()) for name in listed]
            entry["ece"] = draws.error_figure(calibration_error(*bins))
            entry["reliability"] = _reliability(*(each.sum(0) for each in bins))
        for column in part.columns.difference(["method", "subject_id", "scan_id", *listed, *sums], sort=False):
            values = part[column].to_numpy(dtype=float)
            known = np.isfinite(values)
            if known.any():
                some = Bootstrap(units[known], resamples, seed, "segmentation")
                entry[str(column)] = some.figure(mean_of(values[known]))
        found.append(entry)
    return found


def _reliability(voxels: np.ndarray, foretold: np.ndarray, marked: np.ndarray) -> list[dict[str, Any]]:
    """Of each bin with any voxel: what was foretold on average, what was so, and how many voxels."""
    return [
        {"foretold": rounded(float(p / n)), "marked": rounded(float(y / n)), "voxels": int(n)}
        for n, p, y in zip(voxels, foretold, marked, strict=True)
        if n
    ]


def lesion_dice(truth: np.ndarray, found: Sequence[np.ndarray]) -> dict[str, float]:
    """Dice of a lesion (*spatial) as it is found in each of several images, on average: `lesion_dice`, NaN where there
    is none; and `lesion_excess`, how many voxels more are found than there are, as a share of these.
    """
    there = truth > 0
    if not there.any():
        return {"lesion_dice": float("nan"), "lesion_excess": float("nan")}
    shares = [2 * (there & one).sum() / (there.sum() + one.sum()) for one in found]
    excess = [(int(one.sum()) - int(there.sum())) / int(there.sum()) for one in found]
    return {"lesion_dice": float(np.mean(shares)), "lesion_excess": float(np.mean(excess))}
