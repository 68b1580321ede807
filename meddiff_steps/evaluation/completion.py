"""How well what was missing of scans was completed: closeness to the truth, and whether draws say how unsure they are.

Of several draws of one scan, any one is judged as an image of its own, and their mean as the best guess.  Were the
truth but one more draw, it would lie between the least and the largest of k draws with probability (k - 1) / (k + 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.evaluation.image_quality import SsimSettings, psnr, structural_similarity
from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.statistics.measures import mean_of, mean_where_known

#: Voxels around a region that its SSIM is computed with.
MARGIN = 3


def closeness(truth: np.ndarray, image: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """PSNR (dB) and mean absolute error over a region, and SSIM of the box around it.

    Parameters
    ----------
    truth, image
        (*spatial), in [0, 1].
    region
        bool (*spatial).
    """
    box = tuple(slice(max(0, int(i.min()) - MARGIN), int(i.max()) + 1 + MARGIN) for i in np.nonzero(region))
    cut, other = truth[box][None, None], image[box][None, None]
    side = min(cut.shape[2:])
    settings = SsimSettings(min(7, side - (side + 1) % 2), (1.0,))
    return {
        "psnr": float(psnr(truth[region][None], image[region][None])[0]),
        "l1": float(np.abs(truth[region] - image[region]).mean()),
        "ssim": float(structural_similarity(cut, other, settings)[0]),
    }


def crps(truth: np.ndarray, draws: np.ndarray) -> float:
    """Continuous ranked probability score of draws (k, n) for values (n,), their mean; as fair as if there were
    infinitely many (Ferro 2014).  Of one draw, or of a guess, it is the mean absolute error.
    """
    k = len(draws)
    error = np.abs(draws - truth).mean()
    if k == 1:
        return float(error)
    ordered = np.sort(draws, axis=0)
    weights = 2 * np.arange(1, k + 1) - k - 1
    spread = (weights[:, None] * ordered).sum(0) / (k * (k - 1))
    return float(error - spread.mean())


def uncertainty(truth: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Of draws (k, n) of values (n,): `crps`; `spread`, their standard deviation, beside `error`, that of their mean
    (both root mean squares, and the same where draws are what they should be: the first is corrected for k); `covered`,
    the share of values between the least and the largest draw.
    """
    k = len(draws)
    if k == 1:
        return {"crps": crps(truth, draws)}
    variance = draws.var(axis=0, ddof=1).mean()
    return {
        "crps": crps(truth, draws),
        "spread": float(np.sqrt((1 + 1 / k) * variance)),
        "error": float(np.sqrt(np.square(draws.mean(0) - truth).mean())),
        "covered": float(((truth >= draws.min(0)) & (truth <= draws.max(0))).mean()),
    }


def judged(truth: np.ndarray, draws: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """`closeness` of single draws (k, *spatial) on average, and `uncertainty` of all, over a region."""
    each = pd.DataFrame([closeness(truth, draw, region) for draw in draws]).mean()
    return {str(name): float(value) for name, value in each.items()} | uncertainty(truth[region], draws[:, region])


def texture(truth: np.ndarray, image: np.ndarray, region: np.ndarray, axes: Sequence[int] | None = None) -> float:
    """Steps between neighbours within a region, root mean square, as a share of those of the truth: below 1 an image is
    smoother than it should be, above it flickers.

    Parameters
    ----------
    truth, image
        (c, *spatial).
    region
        bool (*spatial).
    axes
        Along which neighbours lie; all when left out.
    """
    powers = []
    for values in (image, truth):
        power = 0.0
        for axis in range(region.ndim) if axes is None else axes:
            both = np.take(region, range(1, region.shape[axis]), axis) & np.take(
                region, range(region.shape[axis] - 1), axis
            )
            power += float(np.square(np.diff(values, axis=axis + 1))[:, both].sum())
        powers.append(power)
    return float(np.sqrt(powers[0] / max(powers[1], 1e-12)))


def lesion_left(truth: np.ndarray, clean: np.ndarray, share: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Of a lesion that was put into a scan, how much draws (k, *spatial) show: `lesion_l1`, their mean absolute error
    in it, and `lesion_kept`, the contrast of their mean to the scan without it, as a share of the lesion's own.

    Parameters
    ----------
    truth, clean
        (*spatial): the scan with the lesion, and without.
    share
        (*spatial), in [0, 1]: of each voxel, how much the lesion is.
    """
    return {
        "lesion_l1": float(np.abs(draws - truth)[:, share > 0].mean()),
        "lesion_kept": float((share * (draws.mean(0) - clean)).sum() / (share * (truth - clean)).sum()),
    }


def nominal_coverage(draws: int) -> float | None:
    """What `covered` is where draws are as the truth is."""
    return (draws - 1) / (draws + 1) if draws > 1 else None


def figures(
    rows: pd.DataFrame, by: Sequence[str], best_of: Sequence[str], *, resamples: int, seed: str
) -> list[dict[str, Any]]:
    """A dictionary per group of rows: its names, and every measured column as a figure over subjects, of the
    scans where it is known.

    Parameters
    ----------
    rows
        subject_id, the columns `by`, the last of which is `method`, and measured ones.
    best_of
        Methods without a model; `gain` is the PSNR beyond that of the best of them (on average), scan by scan.
    """
    measured = [c for c in rows.columns if c not in (*by, "subject_id", "scan_id")]
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed, "label": "completion"}
    found: list[dict[str, Any]] = []
    others = list(by[:-1])
    for names, group in rows.groupby(others, sort=False) if others else [((), rows)]:
        means = group.groupby("method", sort=False)["psnr"].mean()
        simple = [name for name in best_of if name in means.index]
        best = max(simple, key=lambda name: means[name]) if simple else None
        reference = group[group["method"] == best].set_index("scan_id")["psnr"] if best else None
        for method, part in group.groupby("method", sort=False):
            entry: dict[str, Any] = {**dict(zip(others, names, strict=True)), "method": method}
            for column in measured:
                known = mean_where_known(part[column].to_numpy(dtype=float), part["subject_id"], **drawn)
                if known is not None:
                    entry[column] = known
            if reference is not None and method not in simple:
                gain = part["psnr"].to_numpy() - reference[part["scan_id"]].to_numpy()
                known = mean_where_known(gain, part["subject_id"], **drawn)
                if known is not None:
                    entry["gain"] = known | {"beyond": best}
            found.append(entry)
    return found


def figures_where_known(rows: pd.DataFrame, column: str, *, resamples: int, seed: str) -> list[dict[str, Any]]:
    """A dictionary per method: its name, and the mean of a column over rows where it is a number, as a figure."""
    found = []
    for method, part in rows[np.isfinite(rows[column])].groupby("method", sort=False):
        units = Bootstrap(part["subject_id"].tolist(), resamples, seed, "completion")
        found.append({"method": method, column: units.figure(mean_of(part[column].to_numpy(dtype=float)))})
    return found


def volumes_after(measured: Mapping[str, Mapping[str, np.ndarray]], truth: str) -> pd.DataFrame:
    """What is measured in images of several kinds, less what is measured in the true ones: a row per kind and scan,
    columns `kind`, `row` and absolute differences by covariate.

    Parameters
    ----------
    measured
        By kind and covariate, (n,).
    """
    parts = []
    for kind, found in measured.items():
        columns = {name: np.abs(values - measured[truth][name]) for name, values in found.items()}
        parts.append(pd.DataFrame({"kind": kind, "row": np.arange(len(next(iter(columns.values())))), **columns}))
    return pd.concat(parts, ignore_index=True)


def volume_figures(rows: pd.DataFrame, units: Mapping[str, str], *, resamples: int, seed: str) -> list[dict[str, Any]]:
    """Mean absolute differences of `volumes_after`, with its column subject_id, as figures by kind and covariate."""
    found = []
    for kind, part in rows.groupby("kind", sort=False):
        draws = Bootstrap(part["subject_id"].tolist(), resamples, seed, "volumes")
        entry: dict[str, Any] = {"kind": kind}
        for name, unit in units.items():
            entry[name] = draws.figure(mean_of(part[name].to_numpy(dtype=float))) | {"unit": unit}
        found.append(entry)
    return found
