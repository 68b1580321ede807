"""Grey levels on [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meddiff_steps.imaging.reading import ScanError


def normalise(
    path: Path,
    image: np.ndarray,
    inside: np.ndarray,
    counted: np.ndarray,
    percentiles: tuple[float, float],
    window: tuple[float, float] | None = None,
) -> tuple[np.ndarray, float, float]:
    """Percentiles over `counted` on the target grid, or the ends of a window, to 0 and 1, clipped; what is not `inside`
    (padding) to 0.

    Returns
    -------
    image
        float32, in [0, 1].
    low, high
        The grey levels that became 0 and 1.

    Raises
    ------
    ScanError
        Nothing is counted, both percentiles are the same, or nothing counted lies within the window.
    """
    values = image[np.broadcast_to(counted, image.shape)]
    if not values.size:
        raise ScanError(
            path,
            "no foreground",
            "nothing of the scan lies in the target grid. Set preprocess.center: foreground, or enlarge"
            " preprocess.shape.",
        )
    low, high = window or (float(v) for v in np.percentile(values, percentiles))
    if window is not None and not ((values > low) & (values < high)).any():
        raise ScanError(
            path,
            "nothing within the window",
            f"grey values from {values.min():g} to {values.max():g}, expected some in the window {low:g} to {high:g}."
            " Check that the scan is in the unit of the window (CT: Hounsfield units), or set another.",
        )
    if not low < high:
        found = f"percentiles {percentiles[0]:g} and {percentiles[1]:g} of the foreground are both {low:g}"
        raise ScanError(
            path,
            "no contrast",
            f"{found}, expected a range of grey values. Check the scan, or widen preprocess.percentiles.",
        )
    scaled = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.where(inside, scaled, np.float32(0)).astype(np.float32), low, high
