"""Whether a scan shows a head or a brain alone, measured in the scan and not taken from what is said of it.

From the surface of a head inwards one meets bright skin and fat, the dark skull, and the brain; from the surface of a
brain that was taken out of its skull the grey values have no such valley.
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.background import Setting, head_of
from meddiff_steps.imaging.reading import Image
from meddiff_steps.imaging.resampling import canonical

#: The measure is taken on every n-th voxel, so that these are about so many mm apart; in scans of larger voxels a skull
#: could not be told.
STEP_MM, COARSEST_MM = 2.0, 6.0
#: How deep (mm) it looks below the surface: beyond scalp and skull, which are 10 to 20 mm thick together.
DEPTH_MM = 26.0
#: Fewest voxels of a layer.
LEAST_VOXELS = 50
#: A valley deeper than this (as a share of bright tissue) is a skull: of 185 brains (IXI, T1w, 2 mm) none has one
#: above 0, of 12 images of brains with lesions (T1w with and without contrast agent, T2w, FLAIR) the deepest is 0.08;
#: heads made of IXI's brains with CSF, skull, scalp, neck and noise have 0.50 and more.
VALLEY = 0.25
#: mL that no brain has; heads have 3,500 and more.
MORE_THAN_A_BRAIN_ML = 2500.0

#: Columns of the quality table, of the image that is learnt from (after its brain mask): the volume of what is not
#: background with what it encloses, and the valley in grey values below its surface, as a share of bright tissue (0:
#: none).  Null for pictures, CT, and voxels of more than `COARSEST_MM`.
SKULL_COLUMNS = {"head_ml": "float64", "skull_valley": "float64"}


def skull_facts(scan: Image, setting: Setting) -> dict[str, Any]:
    """The columns of `SKULL_COLUMNS` of a scan; `setting` is `preprocess.foreground`."""
    nothing: dict[str, Any] = dict.fromkeys(SKULL_COLUMNS)
    if scan.affine is None or setting == "ct" or max(nib.affines.voxel_sizes(scan.affine)) > COARSEST_MM:
        return nothing
    array, affine, _ = canonical(scan)
    spacing = nib.affines.voxel_sizes(affine)
    every = [max(1, int(STEP_MM / mm + 0.01)) for mm in spacing]
    array = array[:: every[0], :: every[1], :: every[2]]
    spacing = spacing * every
    found = head_of(Image(array, affine), setting)
    assert found is not None, "a volume has a head"
    head = found.array
    upper = np.zeros_like(head)  # faces and necks have other layers
    occupied = np.flatnonzero(head.any(axis=(0, 1)))
    if not occupied.size:
        return nothing
    upper[:, :, (occupied[0] + occupied[-1]) // 2 :] = True
    depth = ndimage.distance_transform_edt(np.pad(head, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    step = max(STEP_MM, float(spacing.max()))
    layers = np.where(head & upper, np.ceil(depth / step).astype(int), 0)
    levels = [array[layers == n] for n in range(1, int(DEPTH_MM / step) + 1)]
    profile = [float(np.median(values)) for values in levels if values.size >= LEAST_VOXELS]
    dark, bright = float(array.min()), float(np.percentile(array[head & upper], 90))
    valley = max(
        [min(max(profile[:n]), max(profile[n + 1 :])) - profile[n] for n in range(1, len(profile) - 1)] + [0.0]
    )
    return {
        "head_ml": float(np.count_nonzero(head) * spacing.prod() / 1000),
        "skull_valley": valley / (bright - dark) if bright > dark else 0.0,
    }


def shows_skull(facts: dict[str, Any]) -> bool:
    """Whether the figures of `skull_facts` are those of a head; False where they are null."""
    valley, volume = facts["skull_valley"], facts["head_ml"]
    return valley is not None and (valley > VALLEY or volume > MORE_THAN_A_BRAIN_ML)


def check_statement(quality: pd.DataFrame, skull_stripped: bool) -> str | None:
    """Hold `release.skull_stripped` against the scans of a quality table.

    Returns
    -------
    str or None
        Which scans contradict it, in words; None where none does, or none was measured.

    Raises
    ------
    UserError
        Brains are stated, and half of the measured scans, or more, show heads.  The other way round nothing is at risk,
        and what shows no skull may be no brain.
    """
    measured = quality[quality["skull_valley"].notna()]
    heads = (measured["skull_valley"] > VALLEY) | (measured["head_ml"] > MORE_THAN_A_BRAIN_ML)
    against = measured[heads == skull_stripped]
    if against.empty:
        return None
    first = against.iloc[0]
    found = (
        f"release.skull_stripped is {str(skull_stripped).lower()}, but {len(against)} of {len(measured)} scans show"
        f" {'a head' if skull_stripped else 'a brain alone'}: {first['scan_id']} first ({first['head_ml']:.0f} mL of"
        f" head, a valley of {first['skull_valley']:.2f} below its surface; a skull is one above {VALLEY:g}, or more"
        f" than {MORE_THAN_A_BRAIN_ML:.0f} mL)"
    )
    if not skull_stripped or 2 * len(against) < len(measured):
        return found
    raise UserError(
        f"{found}. Take the brains out (preprocess.brain_mask, or preprocess.brain_extraction: deepbet), or set"
        " release.skull_stripped: false; faces of heads can be recognised, also in synthetic ones: deface scans first."
    )
