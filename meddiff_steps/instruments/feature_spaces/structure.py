"""The space `structure`: how detail is built, by depth below the surface, which neither blur nor noise can imitate.

Spectra, texture and random networks measure how much detail there is, and noise of the right strength supplies it.
Here the shape of its histogram and the order of its directions count as well: blur makes neighbouring gradients agree
too well, noise breaks up the sheets that folds and layers are.
"""

from __future__ import annotations

import itertools
import logging
from functools import partial

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from meddiff_steps.instruments.feature_spaces.base import Context, FeatureSpace, digest_of

ENTRY = {
    "order": 4,
    "title": "fine structure",
    "summary": (
        "Strength, histogram and directional order of fine detail in three layers by depth below the surface: sees"
        " blur and noise, also noise of just the right strength and spectrum; misses anatomy, contrast and the"
        " background."
    ),
    "source": "structure tensor of Förstner and Gülch 1987; shares of its eigenvalues after Westin et al. 1997",
    "spatial_dims": [2, 3],
    "needs": "nothing",
}

logger = logging.getLogger(__name__)

#: Brighter voxels, with the holes that they enclose, are foreground; above any haze, so that haze moves no layer.
FOREGROUND = 0.1
#: Depth of the layers below the surface of the foreground, voxels: above the first of each pair, up to the second.
DEPTHS = ((1.5, 3.5), (3.5, 6.5), (6.5, np.inf))
#: Gaussians, voxels: the low-pass that detail is measured above, that of the gradients, those over which directions
#: are compared, and the one whose grey levels divide an image without background into layers.
HIGH_PASS, GRADIENT, TENSOR, LEVEL = 1.0, 0.5, 1.0, 2.0
#: In 2D there is no planarity; coherence over a wider neighbourhood takes its place.
WIDER = 2.0
#: Gaussians end after so many deviations.
REACH = 3.0
#: A layer with fewer voxels than this is not measured; of more than `MOST_TENSORS`, evenly spaced ones are looked at
#: for directions.
FEWEST, MOST_TENSORS = 50, 30_000
#: Numbers per layer.
PER_LAYER = 5


def layers_by_depth(image: np.ndarray) -> np.ndarray:
    """Layer of each voxel, int8 of the image's shape: 0, 1, 2 from the surface down by `DEPTHS`, -1 in none.

    Beyond the grid is background, so that a foreground that fills it has layers below the border.
    """
    outside, _ = ndimage.label(np.pad(image <= FOREGROUND, 1, constant_values=True))
    depth = ndimage.distance_transform_edt(outside != outside.flat[0])[(slice(1, -1),) * image.ndim]
    found = np.full(image.shape, -1, np.int8)
    for number, (low, high) in enumerate(DEPTHS):
        found[(depth > low) & (depth <= high)] = number
    return found


def layers_by_level(image: np.ndarray) -> np.ndarray:
    """The dark, the middle and the bright third of an image without background, int8 of its shape; its own thirds,
    after smoothing by `LEVEL`.
    """
    smooth = ndimage.gaussian_filter(image, LEVEL, truncate=REACH)
    return np.digitize(smooth, np.quantile(smooth, [1 / 3, 2 / 3])).astype(np.int8)


def _directions(gradients: list[np.ndarray], voxels: np.ndarray, width: float) -> np.ndarray:
    """Eigenvalues of the structure tensor at some voxels (flat), ascending, (n, d)."""
    dims = len(gradients)
    tensor = np.empty((len(voxels), dims, dims))
    for i, j in itertools.combinations_with_replacement(range(dims), 2):
        smooth = ndimage.gaussian_filter(gradients[i] * gradients[j], width, truncate=REACH)
        tensor[:, i, j] = tensor[:, j, i] = smooth.ravel()[voxels]
    return np.linalg.eigvalsh(tensor)


def _spread(voxels: np.ndarray) -> np.ndarray:
    """At most `MOST_TENSORS` of them, evenly spaced."""
    places = np.linspace(0, len(voxels) - 1, min(len(voxels), MOST_TENSORS))
    return voxels[places.round().astype(int)]


def structure(image: np.ndarray, by_level: bool = False) -> tuple[np.ndarray, int]:
    """Five numbers in each of three layers of one image, float32 (*spatial) in [0, 1].

    Standard deviation, kurtosis (3 for a Gaussian) and median magnitude over deviation of the image less its Gaussian
    of `HIGH_PASS` voxels; then means over the structure tensor with eigenvalues l1 >= l2 >= l3: in 3D coherence
    (l1 - l2) / sum and planarity (l2 - l3) / sum, in 2D coherence over `TENSOR` and over `WIDER` voxels.

    Parameters
    ----------
    by_level
        Layers by grey level instead of depth, for images without background.

    Returns
    -------
    numbers, measured
        (15,), surface first, always finite, and how many of the three layers were measured.  A layer with fewer than
        `FEWEST` voxels has the numbers of the one above it (below it, for the first), and all are 0 where there is
        none.
    """
    layer = layers_by_level(image) if by_level else layers_by_depth(image)
    margin = int(np.ceil(REACH * (TENSOR + GRADIENT))) + 2
    inside = ndimage.find_objects(np.asarray(layer >= 0, np.int8))
    if not inside:
        return np.zeros(len(DEPTHS) * PER_LAYER), 0
    box = tuple(slice(max(0, s.start - margin), s.stop + margin) for s in inside[0])
    image, flat = image[box], layer[box].ravel()
    detail = (image - ndimage.gaussian_filter(image, HIGH_PASS, truncate=REACH)).ravel()
    smooth = ndimage.gaussian_filter(image, GRADIENT, truncate=REACH)
    gradients = [np.gradient(smooth, axis=axis) for axis in range(image.ndim)]
    members = [np.flatnonzero(flat == number) for number in range(len(DEPTHS))]
    known = [number for number, voxels in enumerate(members) if len(voxels) >= FEWEST]
    if not known:
        return np.zeros(len(DEPTHS) * PER_LAYER), 0
    some = [_spread(members[number]) for number in known]
    every, ends = np.concatenate(some), np.cumsum([len(voxels) for voxels in some])[:-1]
    shares = []
    for width in (TENSOR,) if image.ndim == 3 else (TENSOR, WIDER):
        values = np.maximum(_directions(gradients, every, width), 0.0)
        gaps = np.diff(values, axis=1)[:, ::-1] / np.maximum(values.sum(1, keepdims=True), 1e-9)
        shares.append(gaps)
    order = [part.mean(0) for part in np.split(np.concatenate(shares, 1), ends)]
    found = {}
    for number, directions in zip(known, order, strict=True):
        values = detail[members[number]].astype(np.float64)
        spread = max(values.std(), 1e-6)
        kurtosis = np.mean(((values - values.mean()) / spread) ** 4)
        found[number] = [values.std(), kurtosis, np.median(np.abs(values)) / spread, *directions]
    rows = [found[max((k for k in known if k <= number), default=known[0])] for number in range(len(DEPTHS))]
    return np.concatenate(rows), len(known)


def structure_features(images: Tensor, by_level: bool = False) -> Tensor:
    """`structure` of images (b, 1, *spatial), (b, 15); a warning says in how many a layer was too thin to measure."""
    found = [structure(image, by_level) for image in images[:, 0].numpy()]
    thin = sum(measured < len(DEPTHS) for _, measured in found)
    if thin:
        logger.warning("structure: %d of %d images have a layer of fewer than %d voxels", thin, len(found), FEWEST)
    return torch.from_numpy(np.array([numbers for numbers, _ in found], np.float32))


def build(context: Context) -> FeatureSpace:
    """The space `structure`: `structure_features`, float32 (b, 15)."""
    by_level = context.foreground == "all"
    # The definition above is fixed by a version, which has to be raised when it changes.
    constants = (FOREGROUND, [low for low, _ in DEPTHS], HIGH_PASS, GRADIENT, TENSOR, LEVEL, WIDER, REACH, FEWEST)
    return FeatureSpace(
        "structure",
        digest_of("structure", 1, by_level, MOST_TENSORS, *constants),
        f"order of fine detail in three layers by {'grey level' if by_level else 'depth below the surface'}",
        partial(structure_features, by_level=by_level),
    )
