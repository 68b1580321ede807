"""Brains out of heads, through deepbet (Fisch et al. 2024): two 3D U-Nets for T1w
scans of adults, whose weights (TorchScript, MIT licence) lie in its wheel, so that nothing is downloaded.

It is an optional dependency: meddiff-steps[brain-extraction].  Masks of any other tool are `preprocess.brain_mask`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.background import Setting
from meddiff_steps.imaging.reading import Image, ScanError
from meddiff_steps.imaging.skull import shows_skull, skull_facts

#: Column of the quality table: the program and version that made the brain mask; "brain already" where the scan showed
#: no skull and was left as it is; null where the study does not extract.
EXTRACTION_COLUMNS = {"brain_extraction": "string"}
BRAIN_ALREADY = "brain already"


@lru_cache(maxsize=1)
def load_deepbet() -> tuple[Any, str]:
    """The networks, on the CPU, and the name and version of their program.

    Raises
    ------
    UserError
        It is not installed.
    """
    try:
        from deepbet import BrainExtraction
    except ImportError as error:
        raise UserError(
            f"preprocess.brain_extraction: deepbet cannot be imported ({error}). Install it with: pip install"
            " 'meddiff-steps[brain-extraction]'; or make masks with another tool and name them in"
            " preprocess.brain_mask."
        ) from None
    return BrainExtraction(no_gpu=True), f"deepbet {importlib.metadata.version('deepbet')}"


def extraction_installed() -> bool:
    """Whether the optional package is there; it is not loaded."""
    return importlib.util.find_spec("deepbet") is not None


def extracted(path: Path, scan: Image, setting: Setting) -> tuple[Image | None, dict[str, Any]]:
    """A brain mask of a scan that shows a skull.  The same bits on any number of threads; no number is drawn.

    Parameters
    ----------
    path
        Of the scan, for messages.
    scan
        A volume.
    setting
        `preprocess.foreground`.

    Returns
    -------
    mask
        Above 0 is brain, on the scan's voxels; None where the scan shows a brain alone.
    facts
        The columns of `EXTRACTION_COLUMNS`.

    Raises
    ------
    ScanError
        No brain was found.
    UserError
        As of `load_deepbet`.
    """
    assert scan.affine is not None, "a volume has an affine"
    networks, version = load_deepbet()
    if not shows_skull(skull_facts(scan, setting)):
        return None, {"brain_extraction": BRAIN_ALREADY}
    import torch  # takes seconds: only in workers that extract

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order could turn a voxel of the surface over
    try:
        _, mask, _ = networks.run(nib.Nifti1Image(scan.array, scan.affine))
    except (AssertionError, ValueError, RuntimeError) as error:  # what it says of an image without a brain
        raise ScanError(
            path,
            "no brain found",
            f"{version} found no brain ({str(error).splitlines()[0] if str(error) else 'no reason given'}). Look at the"
            " scan: it must be a T1w volume of a whole head. Else give masks of another tool (preprocess.brain_mask).",
        ) from None
    finally:
        torch.set_num_threads(threads)
    found = np.asarray(mask.dataobj).astype(np.float32)
    if not found.any():
        raise ScanError(path, "no brain found", f"{version} found no brain. Look at the scan.")
    return Image(found, scan.affine), {"brain_extraction": version}
