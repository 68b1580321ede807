"""How many images the detectors look at together, how large, and how many subjects they are calibrated on; imports
nothing heavy, for use while a workflow is parsed.
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

#: Voxels up to which images are compared voxel by voxel as they are, and to which larger ones are reduced: 20 training
#: scans are read for every image, of 11 MB each at 160 x 224 x 160 voxels.
COMPARED_VOXELS = 2**18


#: Training subjects below which `meddiff` warns before hours are spent: what covariates do to images is then learnt
#: from so few that images resemble these.  Of 32 the verdict was FAIL (docs/own-cohort.md).
FEW_TRAINING_SUBJECTS = 60
#: Training subjects for each number that a covariate is told by (two, or one per level). What such a number does to
#: images is a mean over these subjects; of too few, images resemble them. IXI with 125 for 8 numbers passed the gates
#: of the privacy report, 92 for 12 and 32 for 9 did not (docs/own-cohort.md).
SUBJECTS_PER_NUMBER = 15


def batch_size(shape: Sequence[int]) -> int:
    """Images of `shape` held at once: 32, fewer of large ones, at least 1.

    >>> batch_size((1, 40, 48, 40)), batch_size((80, 96, 80)), batch_size((160, 224, 160))
    (32, 13, 1)
    """
    return max(1, min(BATCH, BATCH_VALUES // math.prod(shape)))


def reduction(shape: Sequence[int]) -> tuple[int, ...]:
    """Sides of the blocks by whose means images of `shape` (*spatial) are compared: as small as leaves at most
    `COMPARED_VOXELS`.

    >>> reduction((32, 40, 32)), reduction((80, 96, 80)), reduction((160, 224, 160)), reduction((1024, 1024))
    ((1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 2))
    """
    side = 1
    while math.prod(n // min(side, n) for n in shape) > COMPARED_VOXELS:
        side += 1
    return tuple(min(side, n) for n in shape)


def subjects_needed(level: float, detectors: int) -> int:
    """Calibration subjects below which the privacy filter has no threshold, `level` being shared over `detectors`.

    A conformal threshold at level a exists from 1 / a - 1 subjects on (`privacy.calibration.conformal_threshold`).
    """
    return math.ceil(detectors / level - 1 - 1e-9)
