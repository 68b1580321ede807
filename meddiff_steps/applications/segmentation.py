"""A structure marked by several draws of a diffusion: their mean is a map of probabilities, their variance says where
they are unsure (an implicit ensemble, Wolleb et al. 2022).

Beside it stand what needs no network, and the same network trained without noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage
from scipy.special import expit, softmax

from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.imaging.pairs import Pairs

ENTRY = {
    "order": 9,
    "summary": "A structure marked by several draws, with a map of how unsure they are, or as several readers mark it",
    "source": "Wolleb et al. 2022; a start from a mask: Guo et al. 2022; readers: Kohl et al. 2018, Rahman et al. 2023;"
    " patches: Bieder et al. 2023; few labels: Rousseau et al. 2023",
    "needs": ["masks or label maps of training scans"],
}

#: Of the simple way: voxels that are smoothed over (standard deviation), share of the head's radius that is cut off at
#: its rim, thresholds that are tried on training scans (robust deviations), and training scans that are looked at.
SMOOTHING, RIM, THRESHOLDS, TRIED_SCANS = 1.0, 0.15, np.arange(0.5, 6.01, 0.25), 200


@dataclass(frozen=True)
class Marked:
    """What a way of marking says of one scan.

    Attributes
    ----------
    shares
        Probability that anything is marked, (*spatial).
    mask
        The best guess, label map (*spatial).
    draws
        Masks that are offered, (k, *spatial); the best guess alone of ways that offer one.
    """

    shares: np.ndarray
    mask: np.ndarray
    draws: np.ndarray

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Self:
        """Of a way that gives nothing but a mask."""
        return cls((mask > 0).astype(float), mask, mask[None])


def marked_by(drawer: Drawer, row: int, scan_id: str) -> dict[str, Marked]:
    """What the networks say of a scan, by way.

    `regression`: the network without noise.  `regression_levels`: masks of its map at as many thresholds as there are
    draws, which lie in each other.  `ensemble`: draws.  `started`: draws that begin at its mask (`settings.start`).
    """
    pairs, settings = drawer.pairs, drawer.settings
    guess = guessed(drawer, row)
    shares, mask = guess.shares, guess.mask
    levels = (np.arange(settings.samples) + 0.5) / settings.samples
    nested = np.stack([np.where(shares > level, np.maximum(mask, 1), 0) for level in levels])
    found = {
        "regression": guess,
        "regression_levels": Marked(shares, mask, nested),
        "ensemble": _ensemble(pairs, drawer.draws(row, scan_id)),
    }
    start = getattr(settings, "start", 0.0)
    if start > 0:
        begun = pairs.encoded(mask[None, None])[0]
        found["started"] = _ensemble(pairs, drawer.draws(row, scan_id, begun, start))
    return found


def guessed(drawer: Drawer, row: int) -> Marked:
    """What the network without noise says of a scan."""
    logits, pairs = drawer.guess(row), drawer.pairs
    mask = pairs.decoded(logits[None])[0, 0]
    # Of a label map the first channel is nothing
    shares = expit(logits[0]) if pairs.kind == "mask" else 1.0 - softmax(logits, axis=0)[0]
    return Marked(shares, mask, mask[None])


def marked_beside(
    beside: Mapping[str, Drawer], few_labels: Mapping[str, Drawer], row: int, scan_id: str
) -> dict[str, Marked]:
    """What networks say that were trained to compare with, by way: `NAME_regression` and `NAME_ensemble` of those
    beside patches, `NAME` of those that learnt from few labels.
    """
    found = {}
    for name, drawer in beside.items():
        found[f"{name}_regression"] = guessed(drawer, row)
        found[f"{name}_ensemble"] = _ensemble(drawer.pairs, drawer.draws(row, scan_id))
    return found | {name: guessed(drawer, row) for name, drawer in few_labels.items()}


def _ensemble(pairs: Pairs, drawn: np.ndarray) -> Marked:
    """Of draws (k, channels, *spatial): the label that most of them have."""
    draws = pairs.decoded(drawn)[:, 0]
    shares = (draws > 0).mean(0)
    if pairs.kind == "mask":
        return Marked(shares, (shares > 0.5).astype(np.int16), draws)
    votes = np.stack([(draws == label).sum(0) for label in pairs.labels])
    return Marked(shares, np.asarray(pairs.labels, np.int16)[votes.argmax(0)], draws)


def majority(truth: np.ndarray) -> np.ndarray:
    """What at least half of the readers (readers, *spatial) marked, with the label that most of them gave it (of as
    many, the lowest), (*spatial).
    """
    labels = np.unique(truth[truth > 0])
    if not labels.size:
        return truth[0]
    votes = np.stack([(truth == label).sum(0) for label in labels])
    marked = 2 * votes.sum(0) >= len(truth)
    return np.where(marked, labels[votes.argmax(0)], 0).astype(truth.dtype)


def mean_label(pairs: Pairs, rows: Sequence[int] | np.ndarray) -> Marked:
    """At each place the label that training scans have there most often, whatever the scan."""
    counts = np.zeros((max(len(pairs.labels), 2), *pairs.shards.shape("image")[1:]))
    labels = np.asarray(pairs.labels)
    for row in rows:
        truths = pairs.truths([row])[0]
        for k, label in enumerate(labels):
            counts[k] += (truths == label).mean(0)
    shares = counts / max(len(rows), 1)
    return Marked(1.0 - shares[0], labels[shares.argmax(0)].astype(np.int16), labels[shares.argmax(0)][None])


@dataclass(frozen=True)
class Brightness:
    """The simple way: what is much brighter (or darker) than the rest of the head, smoothed, and not at its rim.

    Attributes
    ----------
    channel
        Of the sources.
    sign
        1 for brighter, -1 for darker.
    threshold
        In robust deviations.
    """

    channel: int
    sign: int
    threshold: float

    @classmethod
    def of(cls, pairs: Pairs, rows: Sequence[int] | np.ndarray) -> Self:
        """With the largest Dice over all voxels of some training scans."""
        rows = list(rows)[:: max(1, len(rows) // TRIED_SCANS)][:TRIED_SCANS]
        sources, truths = pairs.sources(rows), pairs.truths(rows)[:, 0] > 0
        best, chosen = -1.0, cls(0, 1, float(THRESHOLDS[-1]))
        for channel in range(sources.shape[1]):
            scores = np.stack([score(image) for image in sources[:, channel]])
            for sign in (1, -1):
                for threshold in THRESHOLDS:
                    found = sign * scores > threshold
                    dice = 2 * (found & truths).sum() / max(int(found.sum() + truths.sum()), 1)
                    if dice > best:
                        best, chosen = float(dice), cls(channel, sign, float(threshold))
        return chosen

    def __call__(self, sources: np.ndarray) -> Marked:
        """Of sources (s, *spatial)."""
        return Marked.of_mask((self.sign * score(sources[self.channel]) > self.threshold).astype(np.int16))


def score(image: np.ndarray) -> np.ndarray:
    """Grey values (*spatial) as robust deviations from the head's median, smoothed; 0 at the head's rim and outside."""
    head = ndimage.binary_fill_holes(image > 0.05)
    depth = ndimage.distance_transform_edt(head)
    inside = depth > RIM * depth.max()
    if not inside.any():
        return np.zeros_like(image)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), SMOOTHING)
    values = smooth[inside]
    middle = np.median(values)
    deviation = 1.4826 * np.median(np.abs(values - middle))
    found: np.ndarray = np.where(inside, (smooth - middle) / max(float(deviation), 1e-6), 0.0)
    return found
