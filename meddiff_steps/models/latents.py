"""How latents are standardised before the diffusion model sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from meddiff_steps.errors import UserError

#: Deviations at a position are not allowed below this share of the channel's: where training scans hardly differ (the
#: background), a new subject that does differ would otherwise lie dozens of deviations away.
FLOOR = 0.1


def standardisation(latents: Iterable[np.ndarray], kind: Literal["position", "channel"]) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale of the training latents, so that (z - offset) / scale has mean 0 and deviation 1; one pass.

    With one scale per channel, most of the variance of a centred cohort is what all subjects share: brain against
    background. A diffusion model then spends its noise levels on that, and small errors of the large values show as
    blocks. Standardised at every position, the latents are what makes subjects differ, and errors in the background
    are as small as its variation.

    Parameters
    ----------
    latents
        Posterior means, each (c, *spatial).
    kind
        `position`: statistics per channel and position.  `channel`: per channel only (Rombach et al. 2022 use one
        number).

    Returns
    -------
    offset, scale
        float32 (c, *spatial), scale > 0.

    Raises
    ------
    UserError
        There are no latents.
    """
    count = 0
    total = square = np.zeros(1)
    for latent in latents:
        z = latent.astype(np.float64)
        count, total, square = count + 1, total + z, square + z**2
    if count == 0:
        raise UserError("no training latent was found: the train split is empty after preprocessing. See preprocessed/qc.parquet.")
    mean, second = total / count, square / count
    axes = tuple(range(1, mean.ndim))
    if kind == "channel":
        channel_mean = mean.mean(axes, keepdims=True)
        deviation = np.sqrt(np.maximum(second.mean(axes, keepdims=True) - channel_mean**2, 1e-12))
        mean, deviation = np.broadcast_to(channel_mean, mean.shape), np.broadcast_to(deviation, mean.shape)
    else:
        variance = np.maximum(second - mean**2, 0.0)
        deviation = np.sqrt(variance + FLOOR**2 * np.maximum(variance.mean(axes, keepdims=True), 1e-12))
    return mean.astype(np.float32), deviation.astype(np.float32)
