"""How many images the detectors look at together, and how many subjects they are calibrated on; imports nothing heavy,
for use while a workflow is parsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Images held at once,
BATCH = 32
#: and their values: 13 images of 80 x 96 x 80 voxels, 1 of 160 x 224 x 160.
BATCH_VALUES = 2**23
#: What this takes: live tensors of the encoder of `config/studies/ukb.yaml`, 772 bytes per value when measured; other
#: detectors need less.
BYTES_PER_VALUE = 800


def batch_size(shape: Sequence[int]) -> int:
    """Images of `shape` held at once: 32, fewer of large ones, at least 1.

    >>> batch_size((1, 40, 48, 40)), batch_size((80, 96, 80)), batch_size((160, 224, 160))
    (32, 13, 1)
    """
    return max(1, min(BATCH, BATCH_VALUES // math.prod(shape)))


def subjects_needed(level: float, detectors: int) -> int:
    """Calibration subjects below which the privacy filter has no threshold, `level` being shared over `detectors`.

    A conformal threshold at level a exists from 1 / a - 1 subjects on (`privacy.calibration.conformal_threshold`).
    """
    return math.ceil(detectors / level - 1 - 1e-9)
